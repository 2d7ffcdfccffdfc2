import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { watchKey } from "./key.js";
import { watch } from "./odds.js";
import { Status } from "./status.js";
import { load, save } from "./store.js";

const NAMES = ["chat", "compare"];
const WIDE = matchMedia("(min-width: 60rem)");

const { state, damaged } = load();
const keep = () => save(state) || notify("This browser cannot store the conversation: its storage is full or switched off.");
const chat = new Chat(document.getElementById("chat-view"), state.chat, keep);
const compare = new Compare(document.getElementById("compare-view"), state.compare, keep);

function notify(text) {
  const notice = document.getElementById("notice");
  notice.textContent = text;
  notice.hidden = false;
}

/** Show the view that the address names. Other anchors change nothing. */
function route() {
  const name = location.hash.slice(1) || NAMES[0];
  if (!NAMES.includes(name)) return;
  for (const other of NAMES) {
    document.getElementById(`${other}-view`).hidden = other !== name;
    const link = document.querySelector(`nav [href="#${other}"]`);
    link.toggleAttribute("aria-current", other === name);
    if (other === name) {
      link.setAttribute("aria-current", "page");
      document.title = `${link.textContent} · serve_app playground`;
    }
  }
  document.getElementById("skip").hash = name === "chat" ? "#message" : "#compare-message";
}

/** Store incomplete answers too. */
function leave() {
  chat.stop();
  compare.stop();
  keep();
}

function openSettings() {
  chat.settings.details.open = WIDE.matches;
}

if (damaged) notify("The stored conversation could not be read. This is a new conversation.");
addEventListener("hashchange", route);
addEventListener("pagehide", leave);
WIDE.addEventListener("change", openSettings);
watch();
route();
openSettings();
const status = new Status(document.getElementById("status"), (models) => {
  chat.settings.offer(models);
  compare.offer(models);
});
watchKey(() => status.watch());
status.watch();
