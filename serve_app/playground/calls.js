import { el } from "./dom.js";
import { Frames } from "./frames.js";
import { indented } from "./json.js";

/** The tool calls of an answer. The user can type their results, if `send` is given, which then sends them. */
export class Calls {
  constructor(calls, send) {
    this._calls = calls;
    this._send = send;
    this._shown = [];
    this._frames = new Frames(() => this._write());
    this._button = el("button", { type: "button", className: "results", hidden: true }, "Send results");
    this._button.addEventListener("click", () => send());
    this._list = el("div", { className: "list" });
    this.element = el("div", { className: "calls" }, this._list, this._button);
    this._write();
  }

  /** Add the parts of calls, in OpenAI's form. Parts of one call have the same index. */
  add(parts) {
    for (const { index = 0, id, function: called } of parts) {
      let call = this._calls.find((one) => one.index === index);
      if (!call) this._calls.push((call = { index, id: id || `call_${index}`, name: "", arguments: "", result: "" }));
      call.name += called?.name ?? "";
      call.arguments += called?.arguments ?? "";
    }
    this._frames.request();
  }

  /** Show all of the calls now. */
  finish() {
    this._frames.flush();
  }

  /** Show the fields for the results. */
  ask() {
    if (!this._send || !this._calls.length) return;
    this._button.hidden = false;
    this._shown.forEach(({ result }) => (result.hidden = false));
  }

  /** The results are sent. */
  lock() {
    this._button.hidden = true;
    this._shown.forEach(({ field }) => (field.readOnly = true));
  }

  _write() {
    this._calls.forEach((call, i) => {
      this._shown[i] ??= this._add(call);
      show(this._shown[i].name, call.name);
      show(this._shown[i].code, indented(call.arguments));
    });
  }

  _add(call) {
    const name = el("code");
    const code = el("code");
    const pre = el("pre", { tabIndex: 0, role: "group", "aria-label": "Arguments" }, code);
    const field = el("textarea", { rows: 1, value: call.result });
    field.addEventListener("input", () => (call.result = field.value));
    const result = el("label", { className: "result", hidden: true }, "Result", field);
    const fold = el("details", { className: "fold" }, el("summary", {}, "Tool call: ", name), pre);
    this._list.append(el("div", { className: "call" }, fold, result));
    return { name, code, field, result };
  }
}

/** A text that has not changed keeps its selection. */
function show(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
