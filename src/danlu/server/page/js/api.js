/** The server's API, as the page uses it. Addresses are relative: the page works below any path of a reverse proxy. */

export class ApiError extends Error {
  /** @param {number} status 0: the server was not reached. @param {number | null} retryAfter seconds. */
  constructor(status, message, { code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** A response with a good status; anything else is thrown as an ApiError. Without a session the login form comes. */
export async function request(path, { method = "GET", body, signal } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body, sendable),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, error.message);
  }
  if (response.ok) return response;
  if (response.status === 401) toLogin();
  const answer = await response.json().catch(() => null);
  const wait = Number(response.headers.get("Retry-After"));
  throw new ApiError(response.status, answer?.error?.message ?? response.statusText, {
    code: answer?.error?.code,
    retryAfter: wait > 0 ? wait : null,
  });
}

function toLogin() {
  const key = "danlu.sent-to-login";
  const last = Number(sessionStorage.getItem(key));
  if (Date.now() - last < 10_000) return; // it did not help a moment ago: the error is shown instead
  sessionStorage.setItem(key, String(Date.now()));
  location.reload();
}

const json = async (path, options) => (await request(path, options)).json();
// Read to the end, or the browser would not use the connection again.
const done = async (path, options) => void (await (await request(path, options)).text());

export const listModels = async () => (await json("v1/models")).data;
export const streamChat = (body, signal) => request("v1/chat/completions", { method: "POST", body, signal });

export const signOut = () => done("logout", { method: "POST" });

const CONVERSATIONS = "api/conversations";
const place = (id) => `${CONVERSATIONS}/${encodeURIComponent(id)}`;
const messagePlace = (id, messageId) => `${place(id)}/messages/${encodeURIComponent(messageId)}`;

export const conversations = {
  /** @param {{q?: string, limit?: number, before?: string | null}} filter before: `next` of the page before. */
  list: (filter) => {
    const query = Object.entries(filter).filter(([, value]) => value !== undefined && value !== null && value !== "");
    return json(`${CONVERSATIONS}?${new URLSearchParams(query)}`);
  },
  create: (conversation) => json(CONVERSATIONS, { method: "POST", body: conversation }),
  read: (id) => json(place(id)),
  change: (id, fields) => done(place(id), { method: "PATCH", body: fields }),
  remove: (id) => done(place(id), { method: "DELETE" }),
  saveMessage: (id, { id: messageId, ...fields }) => done(messagePlace(id, messageId), { method: "PUT", body: fields }),
  importAll: (body) => json(`${CONVERSATIONS}/import`, { method: "POST", body }),
  exportPlace: (id, format) => `${place(id)}/export?format=${format}`,
  exportAllPlace: () => `${CONVERSATIONS}/export`,
};

/** The server takes no NUL and no half of a character, both of which a model may write and a user may paste. */
function sendable(key, value) {
  return typeof value === "string" ? value.replaceAll("\0", "\ufffd").toWellFormed() : value;
}
