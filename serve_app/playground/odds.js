// A tooltip with the probabilities of a token and of its alternatives, by pointer and by keyboard.

import { el } from "./dom.js";

const known = new WeakMap();
const tip = document.getElementById("odds");
let shown = null;

/** An element for one piece of text. `odds` has an entry for each of its tokens, or none. */
export function token({ text, odds }) {
  const span = el("span", { className: "token" }, text);
  if (odds.length) {
    known.set(span, odds);
    span.dataset.likely = likely(Math.min(...odds.map(({ logprob }) => logprob)));
  }
  return span;
}

export function watch() {
  // `pointermove`, because text that scrolls under a pointer at rest must not open the tooltip. A touch has no moves.
  for (const type of ["pointermove", "pointerdown"]) {
    document.addEventListener(type, ({ target }) => target !== shown && known.has(target) && show(target));
  }
  document.addEventListener("pointerover", ({ target }) => target !== shown && leave(target));
  document.addEventListener("focusin", ({ target }) => known.has(target) ? show(target) : hide());
  document.addEventListener("keydown", key);
  document.addEventListener("scroll", place, true);
}

/** The tooltip stays while the pointer is on it. A token with the focus keeps its tooltip. */
function leave(target) {
  if (tip.contains(target)) return;
  if (known.has(document.activeElement)) show(document.activeElement);
  else hide();
}

function show(span) {
  hide();
  shown = span;
  span.setAttribute("aria-describedby", tip.id);
  tip.replaceChildren(...known.get(span).map(entry));
  tip.hidden = false;
  place();
}

function hide() {
  shown?.removeAttribute("aria-describedby");
  shown = null;
  tip.hidden = true;
}

/** Below the token, or above it if there is no room below; always within the window. */
function place() {
  if (!shown) return;
  const at = shown.getClientRects()[0] ?? shown.getBoundingClientRect();
  const below = at.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.top = `${below ? at.bottom + 6 : at.top - 6 - tip.offsetHeight}px`;
  tip.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
}

/** The tab key reaches each answer once; the arrow keys move from token to token. */
function key(event) {
  if (event.key === "Escape") hide();
  const from = event.target;
  if (!known.has(from) || event.ctrlKey || event.altKey || event.metaKey) return;
  const to = {
    ArrowLeft: from.previousElementSibling,
    ArrowRight: from.nextElementSibling,
    Home: from.parentElement.firstElementChild,
    End: from.parentElement.lastElementChild,
  }[event.key];
  if (!known.has(to)) return;
  event.preventDefault();
  from.removeAttribute("tabindex");
  to.tabIndex = 0;
  to.focus();
}

function entry({ token: text, logprob, top }) {
  const others = top.filter((other) => other.token !== text);
  const rows = others.map((other) => row(other.token, other.logprob, ""));
  return el("div", { className: "place" }, row(text, logprob, "chosen"), ...rows);
}

function row(text, logprob, className) {
  const bar = el("span", { className: "share" });
  bar.style.inlineSize = `${Math.exp(logprob) * 4}rem`;
  const word = el("code", {}, visible(text));
  return el("p", { className }, word, " ", el("span", { className: "percent" }, percent(logprob)), bar);
}

/** The text with visible characters in place of white space. */
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(empty)";
}

function percent(logprob) {
  const share = Math.exp(logprob) * 100;
  return share > 0 && share < 0.1 ? "less than 0.1 %" : `${share.toFixed(1)} %`;
}

function likely(logprob) {
  return logprob > Math.log(1 / 3) ? "high" : logprob > Math.log(0.1) ? "middle" : "low";
}
