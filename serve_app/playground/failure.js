const RESTART = "It may be restarting. The conversation is kept in this browser; try again in a moment.";

/** What happened and what to do, by the code of the service's error envelope and by three of our own. */
const WORDS = {
  invalid_request: ["The service refused a setting.", "Change it and try again."],
  prompt_too_long: ["This no longer fits the model.", "Start a new conversation, or send a shorter message."],
  body_too_large: ["This is more than the service takes.", "Start a new conversation, or send a shorter message."],
  model_not_found: ["This model is no longer here.", "Choose another model and try again."],
  queue_full: ["The model is busy.", "Others wait already; try again."],
  not_ready: ["The model is not ready.", "The line at the top says how far it is; then try again."],
  deadline_exceeded: ["The answer took too long.", "Lower max tokens, or try again when less is going on."],
  internal_error: ["The service failed.", "Try again. If it fails again, tell its operator."],
  unreachable: ["The service does not answer.", RESTART],
  broken: ["The connection was lost before the answer was whole.", RESTART],
  unknown: ["The service gave no usable answer.", RESTART],
};

export class Failure extends Error {
  /** `message` is the service's own sentence. */
  constructor(code, message = "", { param = null, retryAfter = null } = {}) {
    super(message);
    const [title, advice] = WORDS[code] ?? WORDS.unknown;
    this.title = title;
    this.advice = retryAfter ? `${advice} It expects to need ${retryAfter} s.` : advice;
    this.param = param;
  }

  /** What a record keeps of it. */
  plain() {
    return { title: this.title, message: this.message, advice: this.advice };
  }

  static envelope(error, retryAfter = null) {
    return new Failure(error.code, error.message, { param: error.param, retryAfter });
  }

  /** A response that is not ok. What stands in front of the service answers without our envelope. */
  static async response(response) {
    const body = await response.json().catch(() => null);
    if (!body?.error) return new Failure("unknown", `Status ${response.status}`);
    return Failure.envelope(body.error, response.headers.get("retry-after"));
  }
}
