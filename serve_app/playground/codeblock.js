import { copyButton } from "./copy.js";
import { el } from "./dom.js";

/** A block of code with its language and a button that copies it. Long lines scroll inside the block. */
export function codeBlock(text, language) {
  const code = el("code", {}, document.createTextNode(text));
  const name = language || "text";
  const copy = copyButton("Copy code", () => code.textContent);
  const head = el("div", { className: "head" }, el("span", {}, name), copy);
  const pre = el("pre", { tabIndex: 0, role: "group", "aria-label": `Code: ${name}` }, code);
  return el("div", { className: "code" }, head, pre);
}

/** Change the text of a block. Its position of scrolling, its focus and its selection stay if the text has grown. */
export function setCode(block, text) {
  const node = block.querySelector("code").firstChild;
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}
