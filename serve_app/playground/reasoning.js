import { el } from "./dom.js";

/** The folded reasoning of an answer. It is hidden as long as it is empty. */
export class Reasoning {
  constructor(text) {
    this._text = document.createTextNode("");
    const body = el("p", {}, this._text);
    this.element = el("details", { className: "fold reasoning", hidden: true }, el("summary", {}, "Reasoning"), body);
    this.add(text);
  }

  add(text) {
    this._text.appendData(text);
    this.element.hidden = this._text.length === 0;
  }
}
