import { announce, el } from "./dom.js";

const SHOWN_MS = 2000;

/** A button that copies the text that `text` returns, and says for 2 s whether that worked. */
export function copyButton(label, text) {
  const button = el("button", { type: "button", className: "quiet copy", "aria-label": label }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not allowed";
    button.removeAttribute("aria-label");
    announce(button.textContent);
    setTimeout(() => {
      button.textContent = "Copy";
      button.setAttribute("aria-label", label);
    }, SHOWN_MS);
  });
  return button;
}

/** Browsers offer the clipboard on https and localhost only. Elsewhere `execCommand` works. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const from = document.activeElement;
    const field = el("textarea", { value: text, className: "unseen" });
    (from.closest("dialog") ?? document.body).append(field); // an open dialog makes the rest of the page inert
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    from.focus();
    return done;
  }
}
