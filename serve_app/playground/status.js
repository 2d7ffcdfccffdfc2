import { models } from "./api.js";

const UNAVAILABLE_MS = 2000;
const AVAILABLE_MS = 15000;

/** Requests the states of the models every 2 s while one is not available, else every 15 s and after each failure. */
export class Status {
  constructor(element, found) {
    this._element = element;
    this._found = found;
    this._seen = "";
    document.addEventListener("failure", () => this.watch());
  }

  async watch() {
    const available = document.hidden || (await this._update());
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this.watch(), available ? AVAILABLE_MS : UNAVAILABLE_MS);
  }

  async _update() {
    try {
      const all = await models();
      if (this._seen !== (this._seen = JSON.stringify(all))) this._found(all);
      const missing = all.filter(({ parent, state }) => !parent && (state === "loading" || state === "failed"));
      this._show(missing.length ? "waiting" : "ready", missing.map(sentence).join("; ") || "Ready");
      return !missing.length;
    } catch (error) {
      this._show("away", error.code === "invalid_api_key" ? "The service needs an API key" : "The service does not answer");
      return false;
    }
  }

  /** The element is a live region: screen readers read each text that is written. */
  _show(state, words) {
    this._element.dataset.state = state;
    if (this._element.textContent !== words) this._element.textContent = words;
  }
}

function sentence({ id, state, detail }) {
  const words = state === "loading" ? `${id} is being loaded` : `${id} cannot be loaded`;
  return detail ? `${words} (${detail})` : words;
}
