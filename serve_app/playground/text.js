import { el } from "./dom.js";
import { Frames } from "./frames.js";
import { Markdown } from "./markdown.js";
import { token } from "./odds.js";

/** The text of an answer: formatted Markdown, or its tokens with their probabilities. */
export class AnswerText {
  /** `tokens` are shown in the form that suits them. */
  constructor(tokens) {
    this.element = el("div", { role: "group" });
    this._tokens = [];
    this._source = "";
    this._frames = new Frames(() => this._markdown?.write(this._source));
    this._show(tokens.some(({ odds }) => odds.length));
    tokens.forEach((one) => this.add(one));
    this.finish();
  }

  /** Whether a token has probabilities. */
  get hasOdds() {
    return this._tokens.some(({ odds }) => odds.length);
  }

  get asTokens() {
    return this._markdown === null;
  }

  set asTokens(asTokens) {
    this._show(asTokens);
    if (asTokens) this._tokens.forEach((one) => this._append(one));
    else this._frames.request();
    this.finish();
  }

  add(one) {
    this._tokens.push(one);
    this._source += one.text;
    if (this._tokens.length === 1 && one.odds.length) this._show(true);
    if (this.asTokens) this._append(one);
    else this._frames.request();
  }

  /** Show all of the text now. */
  finish() {
    this._frames.flush();
    this._markdown?.finish(this._source);
  }

  _show(asTokens) {
    this.element.replaceChildren();
    this.element.className = asTokens ? "text tokens" : "text formatted";
    this.element.setAttribute("aria-label", "Answer");
    this._markdown = asTokens ? null : new Markdown(this.element);
  }

  _append(one) {
    const span = token(one);
    if (one.odds.length && !this.element.querySelector("[tabindex]")) {
      span.tabIndex = 0;
      this.element.setAttribute("aria-label", "Answer. The arrow keys move from token to token.");
    }
    this.element.append(span);
  }
}
