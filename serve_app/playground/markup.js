// Elements for the tokens of the Markdown parser. Text never becomes markup: the answer of a model is untrusted.

import { codeBlock } from "./codeblock.js";
import { el } from "./dom.js";

const SCHEMES = ["http:", "https:", "mailto:"];
const DEEPEST = 30; // deeper levels are shown as text

const BLOCKS = {
  // One level for all, because answers leave levels out and the page has the levels above.
  heading: (one, depth) => el("h4", { "data-depth": one.depth }, ...inline(one.tokens, depth)),
  paragraph: (one, depth) => el("p", {}, ...inline(one.tokens, depth)),
  text: (one, depth) => el("span", {}, ...inline(one.tokens ?? [one], depth)),
  code: ({ text, lang }) => codeBlock(text, language(lang)),
  blockquote: (one, depth) => el("blockquote", {}, ...blocks(one.tokens, depth)),
  list: (one, depth) => {
    const list = one.ordered ? el("ol", { start: one.start }) : el("ul");
    list.append(...one.items.map((each) => item(each, depth)));
    return list;
  },
  table,
  checkbox: ({ checked }) => checkbox(checked),
  hr: () => el("hr"),
};

const INLINES = {
  text: ({ text }) => decoded(text),
  escape: ({ text }) => text,
  codespan: ({ text }) => el("code", {}, text),
  strong: (one, depth) => el("strong", {}, ...inline(one.tokens, depth)),
  em: (one, depth) => el("em", {}, ...inline(one.tokens, depth)),
  del: (one, depth) => el("del", {}, ...inline(one.tokens, depth)),
  br: () => el("br"),
  html: ({ raw }) => (/^<br\s*\/?>$/i.test(raw) ? el("br") : raw),
  checkbox: ({ checked }) => checkbox(checked),
  link: (one, depth) => link(one.href, inline(withoutLinks(one.tokens), depth)) ?? one.raw,
  image: ({ href, text, raw }) => link(href, [`Image: ${text || href}`]) ?? raw, // it would tell its host of the user
};

/** The element of a block at the level `depth`. */
export function block(token, depth = 0) {
  const make = depth < DEEPEST ? BLOCKS[token.type] : null;
  return make ? make(token, depth + 1) : el("p", { className: "raw" }, token.raw);
}

export function item(token, depth = 1) {
  return el("li", { className: token.task ? "task" : "" }, ...blocks(token.tokens, depth));
}

export function language(lang) {
  return (lang ?? "").split(/\s/)[0];
}

function blocks(tokens, depth) {
  return tokens.filter(({ type }) => !INVISIBLE.includes(type)).map((token) => block(token, depth));
}

/** The types of tokens without an element. */
export const INVISIBLE = ["space", "def"];

function inline(tokens, depth) {
  return tokens.map((token) => {
    const make = depth < DEEPEST ? INLINES[token.type] : null;
    return make ? make(token, depth + 1) : token.raw;
  });
}

/** Links of other schemes, for example javascript:, and relative ones, which would be of this service, are no links. */
function link(href, children) {
  const { href: address, protocol } = URL.canParse(decoded(href)) ? new URL(decoded(href)) : {};
  if (!SCHEMES.includes(protocol)) return null;
  return el("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

/** The tokens inside a link, with the text of images in place of links. */
function withoutLinks(tokens) {
  return tokens.map((token) => (["image", "link"].includes(token.type) ? { type: "text", text: token.text } : token));
}

function checkbox(checked) {
  return el("span", { role: "img", "aria-label": checked ? "done" : "not done" }, checked ? "☑" : "☐");
}

function table({ header, rows }, depth) {
  const cell = (tag) => (one) => el(tag, { className: one.align ?? "" }, ...inline(one.tokens, depth));
  const head = header.map((one) => cell(one.text ? "th" : "td")(one));
  const body = rows.map((row) => el("tr", {}, ...row.map(cell("td"))));
  const whole = el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  return el("div", { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" }, whole);
}

/** The text with characters in place of entities. A parsed document runs no script and loads nothing. */
function decoded(text) {
  return text.replace(/&(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z][a-z\d]{1,31});/gi, (entity) => {
    return new DOMParser().parseFromString(entity, "text/html").body.textContent;
  });
}
