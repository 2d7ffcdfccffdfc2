import { codeBlock } from "./codeblock.js";
import { el } from "./dom.js";
import { curl, javascript, python } from "./programs.js";

const dialog = document.getElementById("code");
const { origin, pathname } = new URL("../v1", import.meta.url); // the service may have a route prefix
const PROGRAMS = [
  ["curl", curl],
  ["Python", python],
  ["JavaScript", javascript],
];

dialog.querySelector(".close").addEventListener("click", () => dialog.close());

/** Open a dialog with programs that send the request `body` and print the answer as it arrives. */
export function showCode(body) {
  const base = origin + pathname;
  const blocks = PROGRAMS.map(([name, program]) => codeBlock(program(base, { ...body, stream: true }), name));
  dialog.querySelector(".programs").replaceChildren(...blocks);
  dialog.showModal();
}
