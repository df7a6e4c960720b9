/** What can be done in a conversation: ask, edit, answer again, continue, stop, show another version. */
import { complete } from "./completion.js";
import { remembered } from "./preferences.js";

const SAVE_EVERY = 3000; // milliseconds; what a growing answer may lose if the page is closed
const LONGEST_WAIT = 120; // seconds; a server that asks for more is not waited for

export class Chat extends EventTarget {
  conversation = null;
  /** Answers that are being written or have failed: message id -> {phase, conversation?, controller?, error?, retryIn?}. */
  states = new Map();

  /** Shows a conversation. Answers of the last one go on, and are kept. */
  open(conversation) {
    this.conversation = conversation;
    this.#changed();
  }

  /** Whether an answer of the shown conversation is on its way. */
  get isRunning() {
    return [...this.states].some(([id, state]) => state.controller && this.conversation.tree.get(id));
  }

  /** A conversation whose answers are still being written, if it is one: it is further than what the server has of it. */
  running(id) {
    return [...this.states.values()].find(({ controller, conversation }) => controller && conversation.id === id)
      ?.conversation;
  }

  /** Asks every model that is shown. Columns that show the same branch share the question. */
  ask(content) {
    const { conversation } = this;
    const questions = new Map();
    conversation.leaves.forEach((leaf, column) => {
      if (!questions.has(leaf)) questions.set(leaf, conversation.addQuestion(leaf, content));
      conversation.leaves[column] = questions.get(leaf).id;
    });
    for (const question of questions.values()) conversation.saveMessage(question);
    conversation.models.forEach((_, column) => this.#answerIn(column));
    this.dispatchEvent(new Event("asked"));
  }

  /** The question anew, beside the old one, in every column that shows it. */
  edit(question, content) {
    const { conversation } = this;
    const columns = conversation.columnsWith(question);
    const edited = conversation.addQuestion(question.parent, content);
    conversation.saveMessage(edited);
    for (const column of columns) {
      conversation.leaves[column] = edited.id;
      this.#answerIn(column);
    }
    this.dispatchEvent(new Event("asked"));
  }

  /** Another answer to the same question, beside the old one. */
  answerAgain(answer, column) {
    this.conversation.leaves[column] = answer.parent;
    this.#answerIn(column);
  }

  /** More of an answer that was cut off. */
  resume(answer) {
    answer.finish_reason = null;
    return this.#run(this.conversation, answer);
  }

  /** After an error: the same answer, from where it is. */
  retry(answer) {
    return this.#run(this.conversation, answer);
  }

  /** Shows another version of a message, with the newest that hangs below it. */
  show(version, column) {
    const { conversation } = this;
    const shared = version.role === "user" ? conversation.columnsWith(this.#shownBeside(version, column)) : [column];
    for (const each of shared) {
      conversation.leaves[each] = conversation.tree.newestLeaf(version.id, conversation.models[each]);
    }
    this.#changed();
    conversation.saveFields();
  }

  #shownBeside(version, column) {
    return this.conversation.path(column).find((message) => message.parent === version.parent);
  }

  stop() {
    for (const [id, { controller }] of this.states) {
      if (this.conversation.tree.get(id)) controller?.abort();
    }
  }

  #answerIn(column) {
    const { conversation } = this;
    const answer = conversation.addAnswer(conversation.leaves[column], conversation.models[column]);
    conversation.leaves[column] = answer.id;
    this.#run(conversation, answer);
  }

  async #run(conversation, answer) {
    const controller = new AbortController();
    const state = { phase: "waiting", controller, conversation };
    this.states.set(answer.id, state);
    this.#changed();
    conversation.saveMessage(answer);
    conversation.saveFields();
    const { system, parameters } = conversation;
    const question = {
      system,
      parameters,
      path: conversation.tree.path(answer.parent),
      withTokens: remembered("heat", false),
    };
    let saved = performance.now();
    const grown = () => {
      state.phase = "writing";
      this.#grown(answer);
      if (performance.now() - saved < SAVE_EVERY) return;
      saved = performance.now();
      conversation.saveMessage(answer);
    };
    try {
      await complete(answer, question, controller.signal, grown);
      this.states.delete(answer.id);
    } catch (error) {
      if (error.name === "AbortError") this.states.set(answer.id, { phase: "stopped" });
      else this.#fail(conversation, answer, error);
    }
    conversation.saveMessage(answer);
    this.#changed();
    this.dispatchEvent(new CustomEvent("ended", { detail: answer }));
  }

  #fail(conversation, answer, error) {
    const state = { phase: "failed", error, conversation };
    this.states.set(answer.id, state);
    if (error.status !== 429 || !error.retryAfter || error.retryAfter > LONGEST_WAIT) return;
    // The server says when to come again. Stopping, or asking by hand, ends the waiting.
    state.retryIn = Math.ceil(error.retryAfter);
    state.controller = new AbortController();
    const clock = setInterval(() => {
      if (this.states.get(answer.id) !== state) return clearInterval(clock);
      state.retryIn -= 1;
      if (state.retryIn > 0) return this.#grown(answer);
      clearInterval(clock);
      return this.#run(conversation, answer);
    }, 1000);
    state.controller.signal.addEventListener("abort", () => {
      clearInterval(clock);
      this.states.set(answer.id, { phase: "failed", error });
      this.#changed();
    });
  }

  #changed() {
    this.dispatchEvent(new Event("changed"));
  }

  #grown(answer) {
    this.dispatchEvent(new CustomEvent("grown", { detail: answer }));
  }
}
