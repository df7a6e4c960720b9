/** The panels at both sides: beside the conversation where there is room, over it on a phone. */
import { remember, remembered } from "./preferences.js";

const isNarrow = window.matchMedia("(max-width: 56rem)");

export class Drawer {
  #wanted;
  #opener = null;

  /** @param {{openAtFirst: boolean, narrow?: MediaQueryList}} how openAtFirst: where there is room. */
  constructor(panel, name, openAtFirst) {
    Object.assign(this, { panel, name });
    this.backdrop = document.getElementById("backdrop");
    this.#wanted = remembered(`drawer.${name}`, openAtFirst);
    this.backdrop.addEventListener("click", () => isNarrow.matches && this.close());
    panel.querySelector(".close-drawer").addEventListener("click", () => this.close());
    isNarrow.addEventListener("change", () => this.#show(!isNarrow.matches && this.#wanted));
    this.#show(!isNarrow.matches && this.#wanted);
  }

  get isOpen() {
    return !this.panel.hidden;
  }

  get covers() {
    return this.isOpen && isNarrow.matches;
  }

  toggle() {
    if (this.isOpen) this.close();
    else this.open();
  }

  open() {
    this.#opener = document.activeElement;
    this.#want(true);
    if (isNarrow.matches) this.panel.querySelector("button, input, textarea").focus();
  }

  close() {
    this.#want(false);
    this.#opener?.focus();
    this.#opener = null;
  }

  #want(open) {
    if (!isNarrow.matches) remember(`drawer.${this.name}`, (this.#wanted = open));
    this.#show(open);
  }

  #show(open) {
    this.panel.hidden = !open;
    const covering = [...document.querySelectorAll(".drawer:not([hidden])")];
    const covered = isNarrow.matches && covering.length > 0;
    this.backdrop.hidden = !covered;
    document.getElementById("main").inert = covered; // what is covered takes neither focus nor clicks
    document.dispatchEvent(new CustomEvent("drawers"));
  }
}
