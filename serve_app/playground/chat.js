import { AnswerView, stream, textOf } from "./answer.js";
import { Composer } from "./composer.js";
import { el } from "./dom.js";
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
    this.settings = new Settings(root.querySelector(".side"), state.settings, (values) => {
      state.settings = values;
      save();
    });
    this._composer = new Composer(root.querySelector(".composer"), (text) => this._send(text), () => this.stop());
    this._clear.addEventListener("click", () => this._begin());
    this._empty.addEventListener("click", ({ target }) => target.matches("button") && this._send(target.textContent));
    state.turns.forEach((turn) => this._turns.append(this._item(turn)));
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
    this._state.turns.push({ prompt, answer: null });
    this._turns.append(el("li"));
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
    const failure = await stream(this.settings.request(this._messages()), this._abort.signal, this._last);
    this._composer.busy = false;
    if (failure?.param) this.settings.markInvalid(failure.param);
    this._save();
  }

  _item({ prompt, answer: given }) {
    this._last = new AnswerView(given, () => this._answer());
    const asked = el("div", { className: "asked" }, el("h3", { className: "unseen" }, "You"), el("p", {}, prompt));
    return el("li", { className: "turn" }, asked, this._last.element);
  }

  /** Turns without an answer are left out: the model would see two prompts in a row. */
  _messages() {
    const turns = this._state.turns;
    const before = turns.slice(0, -1).filter((turn) => textOf(turn.answer));
    return [
      ...before.flatMap((turn) => [
        { role: "user", content: turn.prompt },
        { role: "assistant", content: textOf(turn.answer) },
      ]),
      { role: "user", content: turns.at(-1).prompt },
    ];
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
