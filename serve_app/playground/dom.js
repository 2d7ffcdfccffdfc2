/** An element with properties or attributes, and children. Strings become text, never markup. */
export function el(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Tell a screen reader once. Answers are not live regions themselves: a word for every token would be noise. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}
