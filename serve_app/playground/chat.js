import { AnswerView, stream } from "./answer.js";
import { Composer } from "./composer.js";
import { el } from "./dom.js";
import { messages } from "./messages.js";
import { Settings } from "./settings.js";
import { answer } from "./store.js";

/** One conversation with one model. `state` is stored in the browser by `save`. */
export class Chat {
  constructor(root, state, save) {
    this._state = state;
    this._save = save;
    this._turns = root.querySelector(".turns");
    this._empty = root.querySelector(".empty");
    this._clear = root.querySelector(".clear");
    this._abort = new AbortController();
    const changed = (values) => {
      state.settings = values;
      save();
    };
    this.settings = new Settings(root.querySelector(".side"), state.settings, changed, () => this._next());
    this._composer = new Composer(root.querySelector(".composer"), (text) => this._send(text), () => this.stop());
    this._clear.addEventListener("click", () => this._begin());
    this._empty.addEventListener("click", ({ target }) => target.matches("button") && this._send(target.textContent));
    state.turns.forEach((turn) => this._append(turn));
    this._showEmpty();
    this._follow();
  }

  /** Scroll to the end of a growing answer, unless the user has scrolled up. */
  _follow() {
    const page = document.documentElement;
    let atEnd = true;
    let before = 0;
    addEventListener("scroll", () => {
      const near = page.scrollHeight - innerHeight - scrollY < 60;
      atEnd = near || (atEnd && scrollY >= before); // the end itself moves down, so only scrolling up counts
      before = scrollY;
    });
    new ResizeObserver(() => {
      if (atEnd && this._state.turns.length && this._turns.checkVisibility()) scrollTo(0, page.scrollHeight);
    }).observe(this._turns);
  }

  stop() {
    this._abort.abort();
  }

  _send(prompt) {
    if (this._composer.busy || !this.settings.check()) return;
    this._composer.field.value = "";
    this._turn(prompt);
  }

  /** Send the results of the tool calls of the last answer. */
  _proceed() {
    if (this._composer.busy || !this.settings.check()) return;
    this._composer.field.focus(); // the button disappears
    this._turn("");
  }

  _turn(prompt) {
    const turn = { prompt, answer: answer() };
    this._state.turns.push(turn);
    this._append(turn);
    this._showEmpty();
    this._answer();
  }

  /** Request an answer to the last turn, also if it has one already. */
  async _answer() {
    if (this._composer.busy || !this.settings.check()) return;
    const turn = this._state.turns.at(-1);
    turn.answer = answer({ model: this.settings.model });
    this._turns.lastElementChild.replaceWith(this._item(turn));
    this._abort = new AbortController();
    this._composer.busy = true;
    this._save();
    scrollTo(0, document.documentElement.scrollHeight);
    const failure = await stream(this.settings.request(messages(this._state.turns)), this._abort.signal, this._last);
    this._composer.busy = false;
    if (failure?.param) this.settings.markInvalid(failure.param);
    this._save();
  }

  /** Show a new turn. The results of earlier tool calls can no longer be changed. */
  _append(turn) {
    this._last?.lock();
    this._turns.append(this._item(turn));
  }

  _item({ prompt, answer: given }) {
    this._last = new AnswerView(given, () => this._answer(), () => this._proceed());
    const asked = el("div", { className: "asked" }, el("h3", { className: "unseen" }, "You"), el("p", {}, prompt));
    return el("li", { className: "turn" }, ...(prompt ? [asked] : []), this._last.element);
  }

  /** The messages of the next request: the text in the message box, if there is one, or the last turn again. */
  _next() {
    const prompt = this._composer.field.value.trim();
    const { turns } = this._state;
    return messages(prompt || !turns.length ? [...turns, { prompt: prompt || "Hello" }] : turns);
  }

  _begin() {
    this.stop();
    this._state.turns.length = 0;
    this._turns.replaceChildren();
    this._showEmpty();
    this._save();
    this._composer.field.focus();
  }

  _showEmpty() {
    const empty = this._state.turns.length === 0;
    this._empty.hidden = !empty;
    this._clear.hidden = empty;
  }
}
