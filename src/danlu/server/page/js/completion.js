/** One answer of a model: the request that asks for it, and the message that its stream fills. */
import { ApiError, streamChat } from "./api.js";
import { serverSentEvents } from "./stream.js";
import { TokenReader } from "./tokens.js";

/** The code of an error in the midst of an answer. */
export const BROKEN_OFF = "broken_off";

/** The fields of a request that the settings of a conversation stand for. */
export function requestFields({ json_schema: schema, tools, extra, ...sampling }) {
  const fields = { ...sampling };
  if (schema) fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  // One call at a time: the next message is its result.
  if (tools?.length) Object.assign(fields, { tools, parallel_tool_calls: false });
  return { ...fields, ...extra };
}

/** The messages of a path, as the API takes them. The message after a tool call is the tool's result. */
export function requestMessages(system, path) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  let calls = [];
  for (const message of path) {
    if (message.role === "user" && calls.length) {
      messages.push(...calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: message.content })));
      calls = [];
    } else if (message.role === "user" && messages.at(-1)?.role === "user") {
      // The question before got no answer; many chat templates want the roles in turns.
      messages.push({ role: "user", content: `${messages.pop().content}\n\n${message.content}` });
    } else if (message.role === "user") {
      messages.push({ role: "user", content: message.content });
    } else if (message.content || message.tool_calls?.length) {
      calls = message.tool_calls ?? [];
      messages.push({
        role: "assistant",
        content: message.content,
        ...(calls.length && {
          tool_calls: calls.map(({ id, name, arguments: text }) => ({
            id,
            type: "function",
            function: { name, arguments: text },
          })),
        }),
      });
    }
  }
  return messages;
}

/**
 * Asks for an answer and writes it into `message` as it comes.
 *
 * @param {object} message a message of role assistant; what it holds already is continued.
 * @param {{system: string, parameters: object, path: object[], withTokens: boolean}} question path: up to the question.
 * @param {() => void} changed called after each piece.
 * @throws {ApiError} before the answer or in the midst of it.
 */
export async function complete(message, { system, parameters, path, withTokens }, signal, changed) {
  const continued = Boolean(message.content);
  const colours = continued ? Boolean(message.logprobs) : withTokens; // of all tokens of an answer or of none
  const body = {
    model: message.model,
    messages: requestMessages(system, continued ? [...path, message] : path),
    stream: true,
    stream_options: { include_usage: true },
    ...requestFields(parameters),
    ...(colours && { logprobs: true, top_logprobs: 5 }),
    ...(continued && { continue_final_message: true, add_generation_prompt: false }),
  };
  const clock = new Clock(message.reasoning_seconds ?? 0, continued ? (message.stats?.completion_tokens ?? 0) : 0);
  const tokens = colours ? new TokenReader(message.logprobs ?? []) : null;
  const response = await streamChat(body, signal);
  let ended = false;
  try {
    for await (const { data } of serverSentEvents(response.body)) {
      // After the end the stream closes by itself, which lets the browser keep the connection.
      if (data === "[DONE]") ended = true;
      else take(JSON.parse(data));
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(0, error.message, { code: BROKEN_OFF });
  }
  if (!ended) throw new ApiError(0, "", { code: BROKEN_OFF });

  function take({ error, choices, usage, timings }) {
    if (error) throw new ApiError(500, error.message, { code: BROKEN_OFF });
    if (choices?.[0]) read(choices[0], message, clock, tokens);
    if (usage) message.stats = clock.stats(usage, timings);
    changed();
  }
}

function read({ delta = {}, logprobs, finish_reason: reason }, message, clock, tokens) {
  const thought = delta.reasoning_content;
  if (thought) {
    message.reasoning = (message.reasoning ?? "") + thought;
    message.reasoning_seconds = clock.thinking();
  }
  if (delta.content) message.content += delta.content;
  for (const { index, id, function: part = {} } of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[index] ??= { id, name: "", arguments: "" });
    call.name += part.name ?? "";
    call.arguments += part.arguments ?? "";
  }
  if (thought || delta.content || delta.tool_calls) clock.token();
  if (tokens && logprobs?.content && !thought) message.logprobs = tokens.read(logprobs.content);
  if (reason) message.finish_reason = reason;
}

/** The times that a page can measure, where the server does not tell better ones. */
class Clock {
  #start = performance.now();
  #first = null;
  #last = null;
  #thoughtBefore;
  #tokensBefore;

  /** What an answer that is continued took so far: seconds of thought, tokens. */
  constructor(thoughtBefore, tokensBefore) {
    this.#thoughtBefore = thoughtBefore;
    this.#tokensBefore = tokensBefore;
  }

  token() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  thinking() {
    return this.#thoughtBefore + (performance.now() - (this.#first ?? performance.now())) / 1000;
  }

  stats(usage, timings) {
    const seconds = (this.#last - this.#first) / 1000;
    const measured = {
      first_token_seconds: this.#first === null ? null : (this.#first - this.#start) / 1000,
      tokens_per_second: seconds > 0 ? (usage.completion_tokens - 1) / seconds : null,
    };
    return {
      first_token_seconds: timings?.first_token_seconds ?? measured.first_token_seconds,
      tokens_per_second: timings?.tokens_per_second ?? measured.tokens_per_second,
      prompt_tokens: usage.prompt_tokens,
      completion_tokens: this.#tokensBefore + usage.completion_tokens,
    };
  }
}
