/** A message box with its buttons. `send` receives the text; `stop` ends the current answer. */
export class Composer {
  constructor(form, send, stop) {
    this.field = form.querySelector("textarea");
    this._send = form.querySelector(".send");
    this._stop = form.querySelector(".stop");
    this._busy = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.field.value.trim();
      if (text && !this._busy) send(text);
    });
    this._stop.addEventListener("click", stop);
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") stop();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
  }

  /** The Send button stays visible, so that a second click on it cannot stop the answer. */
  set busy(busy) {
    const left = document.activeElement === this._stop;
    this._busy = busy;
    this._send.setAttribute("aria-disabled", String(busy));
    this._stop.hidden = !busy;
    if (left && !busy) this.field.focus();
  }

  get busy() {
    return this._busy;
  }
}
