/**
 * The messages of a conversation. An edited question or a repeated answer is a sibling of what it replaces, so the
 * messages form a tree; what is shown is the path to a leaf.
 */
export class MessageTree {
  #messages = new Map();
  #children = new Map();

  constructor(messages = []) {
    for (const message of messages) this.add(message);
  }

  get size() {
    return this.#messages.size;
  }

  add(message) {
    this.#messages.set(message.id, message);
    const siblings = this.#children.get(message.parent) ?? [];
    this.#children.set(message.parent, [...siblings, message]);
  }

  get(id) {
    return this.#messages.get(id);
  }

  children(id) {
    return this.#children.get(id) ?? [];
  }

  /** The messages from the first to this one. */
  path(id) {
    const found = [];
    for (let message = this.get(id); message; message = this.get(message.parent)) found.unshift(message);
    return found;
  }

  /** The versions of a message, oldest first. With `model`, only that model's answers: a column shows one model. */
  versions(message, model = null) {
    return this.children(message.parent).filter(
      (other) => other.role === message.role && (model === null || other.role === "user" || other.model === model),
    );
  }

  /** The end of the newest branch below a message. */
  newestLeaf(id, model = null) {
    for (;;) {
      const below = this.children(id);
      const own = below.filter((message) => model === null || message.role === "user" || message.model === model);
      const next = (own.length ? own : below).at(-1);
      if (!next) return id;
      id = next.id;
    }
  }
}
