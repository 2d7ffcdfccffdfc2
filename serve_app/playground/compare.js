import { AnswerView, stream } from "./answer.js";
import { Composer } from "./composer.js";
import { Settings } from "./settings.js";
import { answer } from "./store.js";

/** One prompt on two models or settings at the same time. */
export class Compare {
  constructor(root, state, save) {
    this._state = state;
    this._save = save;
    this._abort = new AbortController();
    this._sides = [...root.querySelectorAll(".side")].map((place, i) => {
      return new Side(place, state.sides[i], save, () => this._run([this._sides[i]]), () => this._prompt());
    });
    this._composer = new Composer(root.querySelector(".composer"), (text) => this._send(text), () => this.stop());
    this._composer.field.value = state.prompt;
  }

  /** The second side selects the second model, if there is one and the user has not selected another. */
  offer(models) {
    this._sides.forEach((side, i) => side.settings.offer(models, models[i] ?? models[0]));
  }

  stop() {
    this._abort.abort();
  }

  /** The text in the message box, or an example. */
  _prompt() {
    return this._composer.field.value.trim() || "Hello";
  }

  _send(prompt) {
    this._state.prompt = prompt;
    this._run(this._sides);
  }

  async _run(sides) {
    if (this._composer.busy || !sides.every((side) => side.settings.check())) return;
    this._abort = new AbortController();
    this._composer.busy = true;
    this._save();
    await Promise.all(sides.map((side) => side.answer(this._state.prompt, this._abort.signal)));
    this._composer.busy = false;
    this._save();
  }
}

class Side {
  constructor(place, state, save, again, prompt) {
    this._place = place;
    this._state = state;
    this._again = again;
    const changed = (values) => {
      state.settings = values;
      save();
    };
    this.settings = new Settings(place, state.settings, changed, () => ask(prompt()));
    if (state.answer) this._show();
  }

  async answer(prompt, signal) {
    this._state.answer = answer({ model: this.settings.model });
    this._show();
    const failure = await stream(this.settings.request(ask(prompt)), signal, this._view);
    if (failure?.param) this.settings.markInvalid(failure.param);
  }

  _show() {
    this._view?.element.remove();
    this._view = new AnswerView(this._state.answer, this._again);
    this._place.append(this._view.element);
  }
}

function ask(prompt) {
  return [{ role: "user", content: prompt }];
}
