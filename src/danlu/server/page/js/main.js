/** The page: its parts, and how they hang together. */
import { listModels, signOut } from "./api.js";
import { Chat } from "./chat.js";
import { Columns } from "./columns.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { showHelp } from "./dialogs.js";
import { announce, icon, notify } from "./dom.js";
import { Drawer } from "./drawers.js";
import { currentLanguage, label, setLanguage, t, translate } from "./i18n.js";
import { listen } from "./keyboard.js";
import { Pickers } from "./pickers.js";
import { remember, remembered, setTheme } from "./preferences.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";

const find = (id) => document.getElementById(id);

for (const holder of document.querySelectorAll("[data-icon]")) holder.prepend(icon(holder.dataset.icon));
translate();

const chat = new Chat();
let modelNames = [];
let opened = 0;

const pickers = new Pickers(find("pickers"), chat);
const columns = new Columns(find("columns"), find("tabs"), chat, (column) => pickers.mark(column));
const settings = new Settings(find("settings-form"), chat);
const sidebar = new Sidebar(find("sidebar"), { goTo, renamed, deleted });
const composer = new Composer(find("composer"), { chat, mayAsk, editLast: () => columns.editLastQuestion() });
const conversationsDrawer = new Drawer(find("sidebar"), "conversations", true);
const settingsDrawer = new Drawer(find("settings"), "settings", false);

function goTo(id) {
  const place = id ? `#/c/${encodeURIComponent(id)}` : "#/";
  if (location.hash === place) show();
  else location.hash = place;
}

function renamed(id, title) {
  if (chat.conversation.id !== id) return;
  chat.conversation.title = title;
  showTitle();
}

function deleted(id) {
  if (chat.conversation.id !== id) return;
  chat.stop();
  chat.conversation.forget();
  goTo(null);
}

/** Shows the conversation that the address names; a new one where it names none. */
async function show() {
  const turn = ++opened;
  const id = decodeURIComponent(/^#\/c\/([^/]+)$/.exec(location.hash)?.[1] ?? "");
  if (id && id === chat.conversation?.id) return;
  let conversation = null;
  if (id) {
    try {
      conversation = chat.running(id) ?? (await Conversation.open(id));
    } catch {
      notify("error.load", {}, "error");
    }
  }
  if (turn !== opened) return; // another one was chosen while this one was read
  conversation ??= newConversation();
  if (!conversation.models.length && modelNames.length) conversation.addColumn(modelNames[0]);
  conversation.addEventListener("created", () => {
    if (chat.conversation === conversation)
      history.replaceState(null, "", `#/c/${encodeURIComponent(conversation.id)}`);
    sidebar.setCurrent(chat.conversation.id);
    sidebar.refresh();
  });
  chat.open(conversation);
  settings.render();
  columns.follow();
  sidebar.setCurrent(conversation.id);
  if (id && id === conversation.id && !sidebar.knows(id)) sidebar.refresh(); // it was made elsewhere
  if (conversationsDrawer.covers) conversationsDrawer.close();
  if (!window.matchMedia("(pointer: coarse)").matches) composer.focus(); // a phone's keyboard comes when it is asked for
}

function newConversation() {
  const known = remembered("models", []).filter((name) => modelNames.includes(name));
  const models = known.length ? known : modelNames.slice(0, 1);
  return new Conversation({ models, ...remembered("settings", {}) });
}

function mayAsk() {
  if (settings.areValid) return true;
  notify("error.settings", {}, "error");
  settingsDrawer.open();
  settings.focusInvalid();
  return false;
}

function showTitle() {
  const { title } = chat.conversation;
  document.title = title ? `${title} · danlu` : "danlu";
}

chat.addEventListener("changed", () => {
  find("empty").hidden = !chat.conversation.isEmpty;
  find("columns").hidden = chat.conversation.isEmpty;
  showTitle();
});
chat.addEventListener("ended", ({ detail }) => {
  announce(columns.view(detail)?.spoken ?? "");
  sidebar.refresh();
});
chat.addEventListener("asked", () => columns.follow());

find("new").addEventListener("click", () => goTo(null));
find("toggle-sidebar").addEventListener("click", () => conversationsDrawer.toggle());
find("toggle-settings").addEventListener("click", () => settingsDrawer.toggle());
find("help").addEventListener("click", showHelp);
find("leave").hidden = !("keys" in document.documentElement.dataset);
find("leave").addEventListener("click", async () => {
  await signOut();
  location.reload();
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => composer.fill(t(example.dataset.text)));
}

const heat = find("heat");
heat.setAttribute("aria-pressed", remembered("heat", false));
heat.addEventListener("click", () => {
  const on = !remembered("heat", false);
  remember("heat", on);
  heat.setAttribute("aria-pressed", on);
  columns.render();
});

const theme = find("theme");
theme.value = remembered("theme", "system");
theme.addEventListener("change", () => setTheme(theme.value));
const language = find("language");
language.value = currentLanguage();
language.addEventListener("change", () => {
  setLanguage(language.value);
  composer.update();
});

document.addEventListener("drawers", () => {
  find("toggle-sidebar").setAttribute("aria-expanded", conversationsDrawer.isOpen);
  find("toggle-settings").setAttribute("aria-expanded", settingsDrawer.isOpen);
});
document.dispatchEvent(new CustomEvent("drawers"));

listen({
  search() {
    conversationsDrawer.open();
    find("search").select();
  },
  create: () => goTo(null),
  sidebar: () => conversationsDrawer.toggle(),
  settings: () => settingsDrawer.toggle(),
  message: () => composer.focus(),
  help: showHelp,
  escape() {
    if (conversationsDrawer.covers) conversationsDrawer.close();
    else if (settingsDrawer.covers) settingsDrawer.close();
    else chat.stop();
  },
});

try {
  const models = await listModels();
  modelNames = models.filter((model) => (model.danlu?.kind ?? "generate") === "generate").map((model) => model.id);
} catch (error) {
  notify(error.status === 0 ? "error.network" : "error.other", { message: error.message }, "error");
}
pickers.setNames(modelNames);
window.addEventListener("hashchange", show);
await Promise.all([show(), sidebar.refresh()]);
label(find("columns"), "columns");
document.documentElement.dataset.ready = "";
