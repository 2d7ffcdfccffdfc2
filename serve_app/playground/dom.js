/** An element with these properties or attributes and children. Strings become text, never markup. */
export function el(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Let screen readers read a text. Answers are not live regions: screen readers would read every token. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}
