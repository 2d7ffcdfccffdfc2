import { el } from "./dom.js";
import { DEFAULTS } from "./store.js";

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
const WORDS = { system: "system prompt", stop: "stop strings", odds: "no probabilities" };

/** One form of model and sampling controls. `changed` gets all values after each change. */
export class Settings {
  constructor(place, values, changed) {
    place.append(document.getElementById("settings").content.cloneNode(true));
    this.form = place.querySelector("form");
    this.details = place.querySelector("details");
    this._values = { ...values };
    this._changed = changed;
    this._fill();
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this._read());
    this.form.querySelector(".reset").addEventListener("click", () => this._reset());
  }

  get model() {
    return this._values.model;
  }

  /** Name the models there are. `first` takes the place of one that is gone, or that nobody has chosen. */
  offer(models, first = models[0]) {
    const { model } = this.form.elements;
    const wanted = this._values.model;
    model.replaceChildren(...models.map(({ id, state }) => {
      return el("option", { value: id }, state === "ready" ? id : `${id} (${state})`);
    }));
    model.value = models.some(({ id }) => id === wanted) ? wanted : (first?.id ?? "");
    if (model.value !== wanted) this._read();
  }

  /** Whether every field is filled in well; the browser says which one is not. */
  check() {
    if (!this.form.checkValidity()) this.details.open = true; // a folded field cannot be pointed at
    return this.form.reportValidity();
  }

  /** The body of a chat completion. An empty field is left to the service. */
  request(messages) {
    const { model, system, stop, odds } = this._values;
    const body = { model, messages: system ? [{ role: "system", content: system }, ...messages] : messages };
    for (const name of NUMBERS) {
      if (this._values[name] !== "") body[name] = Number(this._values[name]);
    }
    const stops = stop.split("\n").filter(Boolean);
    if (stops.length) body.stop = stops.map((line) => line.replaceAll("\\n", "\n"));
    if (odds) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
    return body;
  }

  /** Mark the field that the service found wrong, until it is changed. */
  blame(name) {
    const field = this.form.elements[name];
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
    this._sum();
  }

  _read() {
    const { odds, ...others } = DEFAULTS;
    for (const name of Object.keys(others)) this._values[name] = this.form.elements[name].value;
    this._values.odds = this.form.elements.odds.checked;
    this._sum();
    this._changed(this._values);
  }

  /** What differs from the defaults, so that two sides can be told apart while their settings are folded. */
  _sum() {
    const changed = Object.keys(DEFAULTS).filter((name) => name !== "model" && this._values[name] !== DEFAULTS[name]);
    const words = changed.map((name) => WORDS[name] ?? `${name.replaceAll("_", " ")} ${this._values[name] || "open"}`);
    this.details.querySelector(".sum").textContent = words.length ? `: ${words.join(", ")}` : "";
  }
}
