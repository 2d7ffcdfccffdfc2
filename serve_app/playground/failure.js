const RESTART = "The service may be restarting. This browser keeps the conversation. Try again in a moment.";

/** A title and advice for each error code of the service, and for three codes of this page. */
const WORDS = {
  invalid_request: ["The service refused a setting.", "Change the setting and try again."],
  context_length_exceeded: ["The conversation is longer than the model's context.", "Start a new conversation, or send a shorter message."],
  body_too_large: ["The request is larger than the service accepts.", "Start a new conversation, or send a shorter message."],
  invalid_api_key: ["The service needs a valid API key.", "Enter a key at the top of the page and try again."],
  permission_denied: ["The API key does not allow this.", "Enter another key at the top of the page and try again."],
  model_not_found: ["The service does not have this model any more.", "Choose another model and try again."],
  queue_full: ["The model is busy.", "The queue of the model is full. Try again."],
  rate_limit_exceeded: ["The limit of this key is reached.", "Wait a moment and try again."],
  insufficient_quota: ["The budget of this key is used up.", "Ask the operator of the service for a higher budget."],
  not_ready: ["The model is not ready.", "The line at the top shows its progress. Try again when it is ready."],
  deadline_exceeded: ["The answer took too long.", "Lower max tokens, or try again when the service is less busy."],
  internal_error: ["The service failed.", "Try again. If it fails again, report the message to the operator of the service."],
  unreachable: ["The service does not answer.", RESTART],
  broken: ["The connection was lost before the answer was complete.", RESTART],
  unknown: ["The service sent an answer that this page cannot read.", RESTART],
};

export class Failure extends Error {
  /** `message` is the sentence of the service. */
  constructor(code, message = "", { param = null, retryAfter = null } = {}) {
    super(message);
    const [title, advice] = WORDS[code] ?? WORDS.unknown;
    this.code = code;
    this.title = title;
    this.advice = retryAfter ? `${advice} The service expects to be able to answer in ${retryAfter} s.` : advice;
    this.param = param;
  }

  /** The part that is stored with an answer. */
  plain() {
    return { title: this.title, message: this.message, advice: this.advice };
  }

  static envelope(error, retryAfter = null) {
    return new Failure(error.code, error.message, { param: error.param, retryAfter });
  }

  /** From a response with an error status. A proxy in front of the service answers without an error object. */
  static async response(response) {
    const body = await response.json().catch(() => null);
    if (!body?.error) return new Failure("unknown", `Status ${response.status}`);
    return Failure.envelope(body.error, response.headers.get("retry-after"));
  }
}
