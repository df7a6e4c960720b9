/** The box where messages are written. */
import { Attachments } from "./attachments.js";
import { icon } from "./dom.js";
import { hint, label } from "./i18n.js";
import { grow, isComposing } from "./text_box.js";

export class Composer {
  #attachments;

  /** @param {{chat: Chat, mayAsk: () => boolean, editLast: () => void}} page mayAsk: false while something is to be mended. */
  constructor(form, { chat, mayAsk, editLast }) {
    Object.assign(this, { form, chat, mayAsk, editLast });
    this.box = form.querySelector("textarea");
    this.button = form.querySelector("[type=submit]");
    const files = form.querySelector("[type=file]");
    this.#attachments = new Attachments(form.querySelector(".chips"), () => this.update());
    form.addEventListener("submit", (event) => (event.preventDefault(), this.#act()));
    this.box.addEventListener("input", () => this.update());
    this.box.addEventListener("keydown", (event) => this.#key(event));
    form.querySelector(".attach").addEventListener("click", () => files.click());
    files.addEventListener("change", async () => {
      await this.#attachments.add([...files.files]);
      files.value = ""; // so that the same file can be chosen again
      this.focus();
    });
    this.box.addEventListener("paste", (event) => this.#takeFiles(event, event.clipboardData));
    for (const name of ["dragover", "drop"]) {
      document.addEventListener(name, (event) => this.#takeFiles(event, event.dataTransfer, name === "drop"));
    }
    chat.addEventListener("changed", () => this.update());
  }

  focus() {
    this.box.focus();
  }

  /** Puts a text into the box, to be changed or sent. */
  fill(text) {
    this.box.value = text;
    this.update();
    this.focus();
  }

  update() {
    const running = this.chat.isRunning;
    const calls = this.#openCalls();
    if (calls.length) hint(this.box, "message.tool", { name: calls.map((call) => call.name).join(", ") });
    else hint(this.box, "message.placeholder");
    if (this.button.dataset.running !== String(running)) {
      this.button.dataset.running = running;
      this.button.replaceChildren(icon(running ? "stop" : "send"));
      label(this.button, running ? "stop" : "send");
    }
    const empty = !this.box.value.trim() && this.#attachments.isEmpty;
    this.button.disabled = !running && (empty || this.chat.conversation.models.length === 0);
    grow(this.box);
  }

  #openCalls() {
    return this.chat.conversation.path(0).at(-1)?.tool_calls ?? [];
  }

  #act() {
    if (this.chat.isRunning) this.chat.stop();
    else this.#send();
  }

  #send() {
    if (this.button.disabled || !this.mayAsk()) return;
    const message = this.#attachments.take(this.box.value);
    this.box.value = "";
    this.chat.ask(message);
    this.update();
    this.focus();
  }

  #key(event) {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      if (!this.chat.isRunning) this.#send();
    } else if (event.key === "ArrowUp" && this.box.value === "" && !this.chat.isRunning) {
      event.preventDefault();
      this.editLast();
    }
  }

  #takeFiles(event, transfer, now = true) {
    if (![...(transfer?.types ?? [])].includes("Files")) return;
    event.preventDefault(); // a dropped file would replace the page
    if (now) this.#attachments.add([...transfer.files]);
  }
}
