// The API key. It is forgotten when the tab is closed, and is in no program that the page shows.

const KEY = "serve_app.key";
const form = document.getElementById("access");

function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // the storage is switched off
  }
}

/** The header with the key; none without a key. A header can have no other characters than these. */
export function keyHeader() {
  const key = form.elements.key.value.trim();
  return /^[\x21-\x7e]+$/.test(key) ? { authorization: `Bearer ${key}` } : {};
}

/** Ask for a key, because the service has refused a call without one, or with this one. */
export function askForKey() {
  form.hidden = false;
}

/** `changed` is called when the user has given another key. */
export function watchKey(changed) {
  form.elements.key.value = stored();
  form.hidden = !form.elements.key.value;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    try {
      sessionStorage.setItem(KEY, form.elements.key.value);
    } catch {
      // the page keeps the key until it is loaded again
    }
    changed();
  });
}
