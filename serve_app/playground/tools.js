let fields = 0;

/** A field for tools, and an element that shows what is wrong with them. */
export class ToolsField {
  constructor(field, wrong) {
    this._field = field;
    this._wrong = wrong;
    wrong.id = `wrong-tools-${fields++}`;
    field.setAttribute("aria-describedby", wrong.id);
  }

  /** With wrong tools the form is invalid. */
  check() {
    const words = complaint(this._field.value);
    this._field.setCustomValidity(words);
    this._field.setAttribute("aria-invalid", String(words !== ""));
    this._wrong.textContent = words;
  }
}

/** The tools that the text lists as JSON. Throws an Error whose message tells the user what is wrong. */
export function parseTools(text) {
  const tools = parse(text);
  if (!Array.isArray(tools)) throw new Error("Tools are a list in square brackets.");
  tools.forEach((tool, i) => {
    if (tool?.type !== "function") throw new Error(`Tool ${i + 1} needs "type": "function".`);
    if (!tool.function?.name) throw new Error(`Tool ${i + 1} needs a "function" with a "name".`);
  });
  return tools;
}

/** What is wrong with the tools, or "". */
function complaint(text) {
  try {
    if (text.trim()) parseTools(text);
    return "";
  } catch (error) {
    return error.message;
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
}
