/** A conversation: its settings, its messages, and what of them the server keeps. */
import { conversations } from "./api.js";
import { notify } from "./dom.js";
import { MessageTree } from "./tree.js";

const LONGEST_TITLE = 80;
const KEPT = [
  ...["parent", "role", "content", "reasoning", "reasoning_seconds", "model", "finish_reason", "stats", "logprobs"],
  "tool_calls",
];

export class Conversation extends EventTarget {
  #writing = Promise.resolve(); // what is written is written in order: a message after its parent
  #unsaved = new Map(); // messages by id, a parent before what hangs below it; what could not be written is tried again
  #unsavedFields = null;
  #failed = false;
  #forgotten = false;

  constructor({ id = null, title = "", system = "", parameters = {}, models = [], leaves = [], messages = [] } = {}) {
    super();
    Object.assign(this, { id, title, system, parameters, models });
    this.tree = new MessageTree(messages.map((message) => ({ ...message })));
    /** The last shown message of each model's column; null before the first. */
    this.leaves = models.map((model, column) => {
      const leaf = leaves[column] ?? leaves[0];
      return this.tree.get(leaf) ? leaf : this.tree.size ? this.tree.newestLeaf(null, model) : null;
    });
  }

  static async open(id) {
    return new Conversation(await conversations.read(id));
  }

  get isEmpty() {
    return this.tree.size === 0;
  }

  path(column) {
    return this.tree.path(this.leaves[column]);
  }

  /** Columns that show a message. */
  columnsWith(message) {
    return this.models.map((_, column) => column).filter((column) => this.path(column).includes(message));
  }

  addQuestion(parent, content) {
    if (!this.title) this.title = titleFrom(content);
    return this.#add({ parent, role: "user", content });
  }

  addAnswer(parent, model) {
    return this.#add({ parent, role: "assistant", content: "", reasoning: null, model });
  }

  #add(fields) {
    const message = { id: newId(), finish_reason: null, stats: null, logprobs: null, ...fields };
    this.tree.add(message);
    return message;
  }

  addColumn(model) {
    this.models = [...this.models, model];
    this.leaves = [...this.leaves, this.leaves[0] ?? this.tree.newestLeaf(null)];
  }

  removeColumn(column) {
    this.models = this.models.toSpliced(column, 1);
    this.leaves = this.leaves.toSpliced(column, 1);
  }

  /** Keeps a message as it is now. A conversation is kept from its first message on. */
  saveMessage(message) {
    const kept = Object.fromEntries(
      KEPT.filter((name) => message[name] !== undefined).map((name) => [name, message[name]]),
    );
    // A copy: the answer may grow while older writing goes on.
    this.#unsaved.set(message.id, structuredClone({ id: message.id, ...kept }));
    return this.#write();
  }

  /** Keeps title, settings, models and what is shown. */
  saveFields() {
    if (this.isEmpty && this.id === null) return Promise.resolve();
    const { title, system, parameters, models } = this;
    // As they are now: by the time they are written, what is shown may not be written yet.
    this.#unsavedFields = { title, system, parameters, models, leaves: this.leaves.filter((leaf) => leaf !== null) };
    return this.#write();
  }

  /** It was deleted: nothing of it is kept any more. */
  forget() {
    this.#forgotten = true;
  }

  #write() {
    this.#writing = this.#writing.then(async () => {
      if (this.#forgotten) return;
      try {
        if (this.id === null) await this.#create();
        await this.#writeMessages();
        await this.#writeFields();
        this.#failed = false;
      } catch (error) {
        if (!this.#failed) notify("error.save", { message: error.message }, "error"); // told once, not at each token
        this.#failed = true;
      }
    });
    return this.#writing;
  }

  async #writeMessages() {
    for (const [id, message] of this.#unsaved) {
      await conversations.saveMessage(this.id, message);
      if (this.#unsaved.get(id) === message) this.#unsaved.delete(id);
    }
  }

  async #writeFields() {
    const fields = this.#unsavedFields;
    if (!fields) return;
    await conversations.change(this.id, fields);
    if (this.#unsavedFields === fields) this.#unsavedFields = null;
  }

  async #create() {
    const { title, system, parameters, models } = this;
    this.id = (await conversations.create({ title, system, parameters, models })).id;
    this.dispatchEvent(new Event("created"));
  }
}

function titleFrom(content) {
  const line = content.trim().split("\n", 1)[0];
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE - 1)}…` : line;
}

/** A random UUID; `crypto.randomUUID` is there only over https and on this very machine. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
