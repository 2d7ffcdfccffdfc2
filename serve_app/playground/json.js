const PARTS = /"(?:\\.|[^"\\])*"?|[{}[\],:]|[^\s{}[\],:"]+/gs;

/** An object of JSON with one value a line. It may be incomplete. Numbers stay as they are written. */
export function indented(json) {
  if (!json.trimStart().startsWith("{")) return json;
  const parts = json.match(PARTS) ?? [];
  let text = "";
  let depth = 0;
  const line = () => `\n${"  ".repeat(depth)}`;
  parts.forEach((part, i) => {
    const opened = "{[".includes(parts[i - 1] ?? " ");
    if ("}]".includes(part)) {
      depth = Math.max(0, depth - 1);
      text += opened ? part : line() + part;
    } else {
      text += (opened ? line() : "") + part;
      if ("{[".includes(part)) depth += 1;
      else if (part === ",") text += line();
      else if (part === ":") text += " ";
    }
  });
  return text;
}
