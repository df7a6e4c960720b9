/** The settings of a conversation: system prompt, sampling, structure. They go into each request as they stand here. */
import { el, textButton } from "./dom.js";
import { hint, say, t } from "./i18n.js";
import { remember } from "./preferences.js";

const number = (name, min, max, step) => ({ name, kind: "number", min, max, step });

/** Bounds are the API's. */
const GROUPS = {
  "settings.sampling": [
    number("temperature", 0, 2, 0.1),
    number("top_p", 0.01, 1, 0.01),
    number("top_k", 0, 1_000_000, 1),
    number("min_p", 0, 1, 0.01),
    number("seed", 0, Number.MAX_SAFE_INTEGER, 1),
  ],
  "settings.length": [number("max_tokens", 1, 1_000_000, 1), { name: "stop", kind: "lines" }],
  "settings.repetition": [
    number("presence_penalty", -2, 2, 0.1),
    number("frequency_penalty", -2, 2, 0.1),
    number("repetition_penalty", 0.01, 10, 0.01),
  ],
  "settings.structure": [
    { name: "json_schema", kind: "json", shape: "object" },
    { name: "tools", kind: "json", shape: "list" },
    { name: "extra", kind: "json", shape: "object" },
  ],
};
const HELPED = new Set(["temperature", "seed", "json_schema", "tools", "extra"]);

export class Settings {
  #fields = new Map(); // name -> {input, spec, error}
  #system;

  constructor(form, chat) {
    this.chat = chat;
    this.#system = hint(
      el("textarea", { id: "p-system", rows: 4, maxlength: 100_000, dir: "auto" }),
      "system.placeholder",
    );
    const groups = Object.entries(GROUPS).map(([title, specs]) =>
      el("fieldset", {}, say(el("legend"), title), ...specs.map((spec) => this.#field(spec))),
    );
    const reset = textButton("settings.reset", () => this.#reset(), { picture: "again", kind: "quiet small" });
    form.replaceChildren(
      el("div", { class: "field wide" }, say(el("label", { for: "p-system" }), "system"), this.#system),
      ...groups,
      el("div", { class: "row between" }, say(el("p", { class: "note" }), "settings.note"), reset),
    );
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => this.#read());
    form.addEventListener("change", () => this.#keep());
  }

  get areValid() {
    return [...this.#fields.values()].every(({ error }) => error.hidden);
  }

  focusInvalid() {
    [...this.#fields.values()].find(({ error }) => !error.hidden)?.input.focus();
  }

  /** Shows the settings of the conversation. */
  render() {
    const { system, parameters } = this.chat.conversation;
    this.#system.value = system;
    for (const { input, spec, error } of this.#fields.values()) {
      input.value = written(parameters[spec.name], spec);
      error.hidden = true;
      input.setAttribute("aria-invalid", "false");
    }
  }

  #field(spec) {
    const id = `p-${spec.name}`;
    const attributes = {
      id,
      name: spec.name,
      "aria-describedby": `${id}-error`,
      autocomplete: "off",
      spellcheck: "false",
    };
    const numeric = { type: "text", inputmode: spec.min < 0 || spec.step < 1 ? "decimal" : "numeric" };
    const input =
      spec.kind === "number"
        ? el("input", { ...attributes, ...numeric })
        : el("textarea", { ...attributes, rows: spec.kind === "json" ? 3 : 2 });
    if (spec.kind === "json") input.classList.add("mono");
    const error = el("p", { class: "field-error", id: `${id}-error`, role: "alert", hidden: true });
    this.#fields.set(spec.name, { input, spec, error });
    const help = HELPED.has(spec.name) ? say(el("p", { class: "help" }), `p.${spec.name}.help`) : null;
    const caption = say(el("label", { for: id }), `p.${spec.name}`);
    return el("div", { class: spec.kind === "number" ? "field" : "field wide" }, caption, input, help, error);
  }

  #read() {
    const parameters = {};
    for (const { input, spec, error } of this.#fields.values()) {
      const { value, problem } = read(input.value.trim(), spec);
      error.hidden = !problem;
      input.setAttribute("aria-invalid", Boolean(problem));
      if (problem) error.textContent = problem;
      else if (value !== undefined) parameters[spec.name] = value;
    }
    Object.assign(this.chat.conversation, { system: this.#system.value, parameters });
  }

  #keep() {
    const { conversation } = this.chat;
    remember("settings", { system: conversation.system, parameters: conversation.parameters });
    conversation.saveFields();
  }

  #reset() {
    Object.assign(this.chat.conversation, { system: "", parameters: {} });
    this.render();
    this.#keep();
  }
}

function written(value, { kind }) {
  if (value === undefined || value === null) return "";
  if (kind === "lines") return value.join("\n");
  return kind === "json" ? JSON.stringify(value, null, 2) : String(value);
}

/** What a field says: a value (undefined: nothing), or a problem. */
function read(text, { kind, min, max, step, shape }) {
  if (text === "") return {};
  if (kind === "lines") return { value: text.split("\n").filter(Boolean) };
  if (kind === "number") {
    const value = Number(text.replace(",", "."));
    const fits = value >= min && value <= max && (step < 1 || Number.isInteger(value));
    return fits ? { value } : { problem: t("invalid.number", { min, max }) };
  }
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return { problem: t("invalid.json", { message: error.message }) };
  }
  if (shape === "list") return Array.isArray(value) ? { value } : { problem: t("invalid.list") };
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  return isObject ? { value } : { problem: t("invalid.object") };
}
