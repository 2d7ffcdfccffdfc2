const REST = 4; // ms of rest for each ms of work

/** Runs `work` after requests: at most once a frame, and in at most a fifth of the time, however long it takes. */
export class Frames {
  constructor(work) {
    this._work = work;
    this._requested = false;
    this._free = 0;
  }

  request() {
    if (this._requested) return;
    this._requested = true;
    const paint = () => requestAnimationFrame(() => this.flush());
    const rest = this._free - performance.now();
    if (rest > 0) setTimeout(paint, rest);
    else paint();
  }

  /** Run the work now if it is requested. */
  flush() {
    if (!this._requested) return;
    this._requested = false;
    const began = performance.now();
    this._work();
    const ended = performance.now();
    this._free = ended + REST * (ended - began);
  }
}
