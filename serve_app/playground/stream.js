/** The server-sent events of a response's body as they arrive: {comment} or {event, data}. */
export async function* events(body) {
  let event = "message";
  let data = [];
  let held = "";
  for await (const text of pieces(body)) {
    // A carriage return at the end may be the first character of a line break of two.
    const lines = (held + text).split(/\r\n|\n|\r(?!$)/);
    held = lines.pop();
    for (const line of lines) {
      const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
      if (line.startsWith(":")) yield { comment: value };
      else if (name === "data") data.push(value);
      else if (name === "event") event = value;
      else if (line === "") {
        if (data.length) yield { event, data: data.join("\n") };
        event = "message";
        data = [];
      }
    }
  }
}

/** The body as text, in whole characters. Ending the iteration early cancels the body. */
async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) yield read.value;
  } finally {
    reader.cancel().catch(() => {}); // a body that failed cannot be cancelled
  }
}
