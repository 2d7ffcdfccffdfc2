import { complete } from "./api.js";
import { Calls } from "./calls.js";
import { copyButton } from "./copy.js";
import { announce, el } from "./dom.js";
import { Failure } from "./failure.js";
import { Reasoning } from "./reasoning.js";
import { AnswerText } from "./text.js";

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

/** The elements of one answer. `again` requests a new answer, `proceed` sends the results of tool calls, if given. */
export class AnswerView {
  constructor(answer, again, proceed = null) {
    this.answer = answer;
    this._waiting = el("p", { className: "waiting", hidden: true });
    this._reasoning = new Reasoning(answer.reasoning);
    this._text = new AnswerText(answer.tokens);
    this._calls = new Calls(answer.calls, proceed);
    this._failure = el("div", { className: "failure", hidden: true });
    this._figures = el("dl", { className: "figures" });
    this._form = this._button("", "form", () => this._changeForm());
    this._again = again;
    this._held = []; // tokens whose text has not arrived yet
    const copy = copyButton("Copy answer", () => textOf(answer));
    const actions = el("div", { className: "actions" }, this._form, copy, this._button("Regenerate", "again", again));
    this.element = el("article", { className: "answer" },
      el("h3", {}, answer.model), this._waiting, this._reasoning.element, this._text.element, this._calls.element,
      this._failure, el("footer", {}, this._figures, actions));
    this._showFigures();
    this._showOutcome();
    this._showForm();
  }

  began() {
    this.element.setAttribute("aria-busy", "true");
    this._wait("Waiting for the first token");
    announce(`${this.answer.model} is answering.`);
  }

  /** Show a part of the stream that arrived `ms` after the request. */
  take({ waiting, text, odds, reasoning, calls, end, usage }, ms) {
    const { answer } = this;
    if (waiting !== undefined && answer.firstMs === null) this._wait(WAITING[waiting] ?? waiting);
    if (text !== undefined) {
      this._waiting.hidden = true;
      answer.count += 1;
      answer.firstMs ??= ms;
      answer.lastMs = ms;
      this._held.push(...odds);
      if (reasoning) this._addReasoning(reasoning);
      if (text) this._addText({ text, odds: this._held.splice(0) });
      if (calls.length) this._calls.add(calls);
      if (reasoning || calls.length) this._held = [];
    }
    if (end) answer.end = end;
    if (usage) [answer.count, answer.promptTokens] = [usage.completion_tokens, usage.prompt_tokens];
    this._showFigures();
  }

  ended(failure) {
    this.element.removeAttribute("aria-busy");
    this._waiting.hidden = true;
    this.answer.failure = failure?.plain() ?? null;
    this._text.finish();
    this._calls.finish();
    this._showFigures();
    this._showOutcome();
    this._showForm();
    if (failure) document.dispatchEvent(new Event("failure"));
    announce(failure ? `${failure.title} ${failure.advice}` : this._summary());
  }

  /** The results of the tool calls are sent. */
  lock() {
    this._calls.lock();
  }

  _summary() {
    const { model, calls } = this.answer;
    const names = calls.map(({ name }) => ` It calls ${name}.`).join("");
    return `${model} answered: ${textOf(this.answer)}${names}`;
  }

  _addReasoning(text) {
    this.answer.reasoning += text;
    this._reasoning.add(text);
  }

  _addText(one) {
    this.answer.tokens.push(one);
    this._text.add(one);
  }

  _changeForm() {
    this._text.asTokens = !this._text.asTokens;
    this._showForm();
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

  _showOutcome() {
    const { failure } = this.answer;
    this._failure.hidden = !failure;
    if (!failure) {
      this._calls.ask();
      return;
    }
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

  _showForm() {
    this._form.hidden = !this._text.hasOdds;
    this._form.textContent = this._text.asTokens ? "Show formatted" : "Show tokens";
  }
}

function figure(className, label, value) {
  return el("div", { className }, el("dt", {}, label), el("dd", {}, value));
}
