import { complete } from "./api.js";
import { announce, el } from "./dom.js";
import { Failure } from "./failure.js";
import { token } from "./odds.js";

const WAITING = { queued: "Waiting until the model has a free slot", warming: "The model is being loaded" };
const ENDS = { length: "cut at max tokens", stopped: "stopped by you" };

/** The text of the tokens so far. */
export function textOf(answer) {
  return answer.tokens.map(({ text }) => text).join("");
}

/** Stream an answer into the view. Returns the Failure that ended it, or null. */
export async function stream(body, signal, view) {
  const began = performance.now();
  view.began();
  let failure = null;
  try {
    for await (const part of complete(body, signal)) view.take(part, performance.now() - began);
  } catch (error) {
    if (signal.aborted) view.answer.end = "stopped";
    else failure = error instanceof Failure ? error : new Failure("unknown", String(error));
  }
  view.ended(failure);
  return failure;
}

/** The elements of one answer. `again` requests a new answer. */
export class AnswerView {
  constructor(answer, again) {
    this.answer = answer;
    this._waiting = el("p", { className: "waiting", hidden: true });
    this._text = el("div", { className: "text", role: "group" });
    this._failure = el("div", { className: "failure", hidden: true });
    this._figures = el("dl", { className: "figures" });
    this._again = again;
    this._held = []; // tokens whose text has not arrived yet
    const actions = el("div", { className: "actions" }, this._copyButton(), this._button("Regenerate", "again", again));
    this.element = el("article", { className: "answer" },
      el("h3", {}, answer.model), this._waiting, this._text, this._failure,
      el("footer", {}, this._figures, actions));
    this._text.setAttribute("aria-label", "Answer");
    answer.tokens.forEach((one) => this._write(one));
    this._showFigures();
    this._showFailure();
  }

  began() {
    this.element.setAttribute("aria-busy", "true");
    this._wait("Waiting for the first token");
    announce(`${this.answer.model} is answering.`);
  }

  /** Show a part of the stream that arrived `ms` after the request. */
  take({ waiting, text, odds, end, usage }, ms) {
    const { answer } = this;
    if (waiting !== undefined && answer.firstMs === null) this._wait(WAITING[waiting] ?? waiting);
    if (text !== undefined) {
      this._waiting.hidden = true;
      answer.count += 1;
      answer.firstMs ??= ms;
      answer.lastMs = ms;
      this._held.push(...odds);
      if (text) this._append({ text, odds: this._held.splice(0) });
    }
    if (end) answer.end = end;
    if (usage) [answer.count, answer.promptTokens] = [usage.completion_tokens, usage.prompt_tokens];
    this._showFigures();
  }

  ended(failure) {
    this.element.removeAttribute("aria-busy");
    this._waiting.hidden = true;
    this.answer.failure = failure?.plain() ?? null;
    this._showFigures();
    this._showFailure();
    if (failure) document.dispatchEvent(new Event("failure"));
    announce(failure ? `${failure.title} ${failure.advice}` : `${this.answer.model} answered: ${textOf(this.answer)}`);
  }

  _append(one) {
    this.answer.tokens.push(one);
    this._write(one);
  }

  _write(one) {
    const span = token(one);
    if (one.odds.length && !this._text.querySelector("[tabindex]")) {
      span.tabIndex = 0;
      this._text.setAttribute("aria-label", "Answer. The arrow keys move from token to token.");
    }
    this._text.append(span);
  }

  _wait(words) {
    this._waiting.hidden = false;
    if (this._waiting.textContent !== words) this._waiting.textContent = words;
  }

  _showFigures() {
    const { firstMs, lastMs, count, promptTokens, end } = this.answer;
    const rate = count > 1 && lastMs > firstMs ? ((count - 1) * 1000) / (lastMs - firstMs) : null;
    const figures = [
      ["ttft", "TTFT", "time to the first token", firstMs === null ? "–" : `${firstMs.toFixed(0)} ms`],
      ["rate", "tok/s", "tokens per second after the first token", rate === null ? "–" : rate.toFixed(1)],
      ["count", "tokens", "number of tokens of the answer", String(count)],
      ["prompt", "prompt", "number of tokens of the prompt", promptTokens === null ? "–" : String(promptTokens)],
    ].map(([name, label, title, value]) => figure(name, el("abbr", { title }, label), value));
    if (ENDS[end]) figures.push(figure("end", el("span", { className: "unseen" }, "ended"), ENDS[end]));
    this._figures.replaceChildren(...figures);
  }

  _showFailure() {
    const { failure } = this.answer;
    this._failure.hidden = !failure;
    if (!failure) return;
    const { title, message, advice } = failure;
    this._failure.replaceChildren(
      el("strong", {}, title),
      ...(message ? [el("p", { className: "detail" }, message)] : []),
      el("p", {}, advice),
      this._button("Try again", "retry", this._again),
    );
  }

  _button(label, className, pressed) {
    const button = el("button", { type: "button", className: `quiet ${className}` }, label);
    button.addEventListener("click", pressed);
    return button;
  }

  _copyButton() {
    const button = this._button("Copy", "copy", async () => {
      button.textContent = (await copy(textOf(this.answer))) ? "Copied" : "Not allowed";
      announce(button.textContent);
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    return button;
  }
}

function figure(className, label, value) {
  return el("div", { className }, el("dt", {}, label), el("dd", {}, value));
}

/** Browsers offer the clipboard on https and localhost only. Elsewhere `execCommand` works. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const from = document.activeElement;
    const field = el("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    from.focus();
    return done;
  }
}
