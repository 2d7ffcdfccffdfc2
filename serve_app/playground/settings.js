import { showCode } from "./code.js";
import { el } from "./dom.js";
import { DEFAULTS } from "./store.js";
import { parseTools, ToolsField } from "./tools.js";

const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "seed",
  "max_tokens",
  "presence_penalty",
  "frequency_penalty",
  "repetition_penalty",
];
const ALTERNATIVES = 5;
const WORDS = { system: "system prompt", tools: "tools", stop: "stop strings", odds: "token probabilities" };

/**
 * One form of model, sampling and tools. `changed` gets all values after each change. `next` returns the messages of
 * the request that the form shows as code.
 */
export class Settings {
  constructor(place, values, changed, next) {
    place.append(document.getElementById("settings").content.cloneNode(true));
    this.form = place.querySelector("form");
    this.details = place.querySelector("details");
    this._values = { ...values };
    this._changed = changed;
    this._tools = new ToolsField(this.form.elements.tools, this.form.querySelector(".wrong"));
    this._fill();
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this._read());
    this.form.querySelector(".reset").addEventListener("click", () => this._reset());
    this.form.querySelector(".as-code").addEventListener("click", () => this.check() && showCode(this.request(next())));
  }

  get model() {
    return this._values.model;
  }

  /** List the models. `first` is selected if the user has selected none or the selected one is gone. */
  offer(models, first = models[0]) {
    const { model } = this.form.elements;
    const wanted = this._values.model;
    model.replaceChildren(...models.map(({ id, state }) => {
      return el("option", { value: id }, state === "ready" ? id : `${id} (${state})`);
    }));
    model.value = models.some(({ id }) => id === wanted) ? wanted : (first?.id ?? "");
    if (model.value !== wanted) this._read();
  }

  /** Whether every field is valid; the browser points at the first invalid one. */
  check() {
    if (!this.form.checkValidity()) this.details.open = true; // the browser cannot point at a field in a closed element
    return this.form.reportValidity();
  }

  /** The body of a chat completion. The service has defaults for empty fields. */
  request(messages) {
    const { model, system, tools, stop, odds } = this._values;
    const body = { model, messages: system ? [{ role: "system", content: system }, ...messages] : messages };
    for (const name of NUMBERS) {
      if (this._values[name] !== "") body[name] = Number(this._values[name]);
    }
    const stops = stop.split("\n").filter(Boolean);
    if (stops.length) body.stop = stops.map((line) => line.replaceAll("\\n", "\n"));
    if (tools.trim()) body.tools = parseTools(tools);
    if (odds) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
    return body;
  }

  /** Mark the field that the service refused until the user changes it. `param` may name a part of the field. */
  markInvalid(param) {
    const field = this.form.elements[param.split(/[.[]/)[0]];
    if (!field) return;
    this.details.open = true;
    field.setAttribute("aria-invalid", "true");
    field.addEventListener("input", () => field.removeAttribute("aria-invalid"), { once: true });
  }

  _reset() {
    this._values = { ...DEFAULTS, model: this._values.model };
    this._fill();
    this._changed(this._values);
  }

  _fill() {
    for (const [name, value] of Object.entries(this._values)) {
      const field = this.form.elements[name];
      if (name === "odds") field.checked = value;
      else field.value = value;
    }
    this._tools.check();
    this._sum();
  }

  _read() {
    const { odds, ...others } = DEFAULTS;
    for (const name of Object.keys(others)) this._values[name] = this.form.elements[name].value;
    this._values.odds = this.form.elements.odds.checked;
    this._tools.check();
    this._sum();
    this._changed(this._values);
  }

  /** Summarize the values that differ from the defaults, so that closed settings can be compared. */
  _sum() {
    const changed = Object.keys(DEFAULTS).filter((name) => name !== "model" && this._values[name] !== DEFAULTS[name]);
    const words = changed.map((name) => WORDS[name] ?? `${name.replaceAll("_", " ")} ${this._values[name] || "open"}`);
    this.details.querySelector(".sum").textContent = words.length ? `: ${words.join(", ")}` : "";
  }
}
