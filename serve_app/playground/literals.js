// Literals of programming languages for JSON values. The strings of JSON are strings of Python and JavaScript too.

const WIDTH = 80;
const IDENTIFIER = /^[a-z_]\w*$/i;

/** An expression of Python. `depth` is the number of indentations of the line that it begins in. */
export function pythonLiteral(value, depth = 0) {
  const words = { true: "True", false: "False", null: "None" };
  return literal(value, { indent: "    ", word: (name) => words[name], key: JSON.stringify, space: "" }, depth);
}

/** An expression of JavaScript. */
export function javascriptLiteral(value) {
  return literal(value, { indent: "  ", word: (name) => name, key: property, space: " " }, 0);
}

/** In an object literal of JavaScript, the name __proto__ would set the prototype. */
function property(name) {
  if (name === "__proto__") return '["__proto__"]';
  return IDENTIFIER.test(name) ? name : JSON.stringify(name);
}

function literal(value, language, depth) {
  if (typeof value === "string" || typeof value === "number") return JSON.stringify(value);
  if (typeof value !== "object" || value === null) return language.word(String(value));
  const [open, close, space] = Array.isArray(value) ? ["[", "]", ""] : ["{", "}", language.space];
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, language, depth + 1))
    : Object.entries(value).map(([name, item]) => `${language.key(name)}: ${literal(item, language, depth + 1)}`);
  const line = items.join(", ");
  if (!line) return open + close;
  if (!line.includes("\n") && line.length < WIDTH) return open + space + line + space + close;
  const margin = language.indent.repeat(depth);
  return `${open}\n${items.map((item) => `${margin}${language.indent}${item},\n`).join("")}${margin}${close}`;
}
