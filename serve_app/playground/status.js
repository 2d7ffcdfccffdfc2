import { models } from "./api.js";

const OFTEN_MS = 2000;
const SELDOM_MS = 15000;

/** Looks how the models are: seldom while all is well, often while something is missing. */
export class Status {
  constructor(element, found) {
    this._element = element;
    this._found = found;
    this._seen = "";
  }

  async watch() {
    const well = document.hidden || (await this._look());
    setTimeout(() => this.watch(), well ? SELDOM_MS : OFTEN_MS);
  }

  async _look() {
    try {
      const all = await models();
      if (this._seen !== (this._seen = JSON.stringify(all))) this._found(all);
      const missing = all.filter(({ state }) => state === "loading" || state === "failed");
      this._say(missing.length ? "waiting" : "ready", missing.map(sentence).join("; ") || "Ready");
      return !missing.length;
    } catch {
      this._say("away", "The service does not answer");
      return false;
    }
  }

  /** A live region: only what is new may be written. */
  _say(state, words) {
    this._element.dataset.state = state;
    if (this._element.textContent !== words) this._element.textContent = words;
  }
}

function sentence({ id, state, detail }) {
  const words = state === "loading" ? `${id} is being loaded` : `${id} cannot be loaded`;
  return detail ? `${words} (${detail})` : words;
}
