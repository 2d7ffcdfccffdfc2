import { setCode } from "./codeblock.js";
import { block, INVISIBLE, item, language } from "./markup.js";
import { Lexer } from "./marked.js";

const OPTIONS = { gfm: true, breaks: true };
const OPEN = 2; // A third block ends the first one; the second one may become a part of it, as "2" becomes "2. b".

/** Shows a growing Markdown text in `root`. It parses only the blocks that more text can change. */
export class Markdown {
  constructor(root) {
    this._root = root;
    this._begin();
  }

  /** Show `text`, which begins with the text of the last call. */
  write(text) {
    const rest = text.replaceAll(/\r\n?/g, "\n").slice(this._parsed);
    const tokens = this._parse(rest);
    const blocks = tokens.filter(visible);
    patch(this._root, this._closed, this._open, blocks, block);
    this._open = blocks;
    this._close(tokens, rest);
  }

  /** Show the complete `text`. A link may have been shown before its definition arrived. */
  finish(text) {
    if (!this._defines) return;
    this._root.replaceChildren();
    this._begin();
    this.write(text);
  }

  _begin() {
    this._links = {}; // the definitions among the closed blocks
    this._defines = false; // whether the text defines a link
    this._parsed = 0; // number of characters of the closed blocks
    this._closed = 0; // number of closed blocks
    this._open = [];
  }

  /** A text that the parser cannot read, for example because it is nested too deeply, is one block. */
  _parse(text) {
    const lexer = new Lexer(OPTIONS);
    Object.assign(lexer.tokens.links, this._links);
    try {
      const tokens = [...lexer.lex(text)];
      this._defines ||= Object.keys(lexer.tokens.links).length > 0;
      return tokens;
    } catch {
      return [{ type: "unreadable", raw: text }];
    }
  }

  /** Close all blocks but the last two. */
  _close(tokens, rest) {
    let raw = "";
    while (this._open.length > OPEN) {
      const token = tokens.shift();
      raw += token.raw;
      if (!rest.startsWith(raw)) return; // the parser has changed the text
      this._parsed += token.raw.length;
      if (token.type === "def") this._links[token.tag] ??= token;
      if (!visible(token)) continue;
      this._open.shift();
      this._closed += 1;
    }
  }
}

function visible({ type }) {
  return !INVISIBLE.includes(type);
}

/** Change the children of `parent` from number `first` on, which show the tokens `before`. Equal ones stay. */
function patch(parent, first, before, after, make) {
  after.forEach((token, i) => {
    const child = parent.children[first + i];
    if (!child) parent.append(make(token));
    else if (!equal(before[i], token) && !grow(child, before[i], token)) child.replaceWith(make(token));
  });
  while (parent.children.length > first + after.length) parent.lastElementChild.remove();
}

function equal(one, other) {
  return one.type === other.type && one.raw === other.raw && one.loose === other.loose;
}

/** Change an element that shows `before` in place; returns whether that is possible. */
function grow(element, before, after) {
  if (before.type !== after.type) return false;
  if (after.type === "code" && language(before.lang) === language(after.lang)) {
    setCode(element, after.text);
    return true;
  }
  if (after.type !== "list" || before.ordered !== after.ordered || before.start !== after.start) return false;
  patch(element, 0, before.items, after.items, item);
  return true;
}
