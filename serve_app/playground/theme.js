// Not a module: it runs before the page is painted, so that the other scheme is never visible.
(() => {
  const key = "serve_app.theme";
  const root = document.documentElement;

  function saved() {
    try {
      return localStorage.getItem(key);
    } catch {
      return null; // the storage is switched off
    }
  }

  function choose(theme) {
    root.dataset.theme = theme;
    try {
      localStorage.setItem(key, theme);
    } catch {
      // the choice is valid until the page is closed
    }
  }

  root.dataset.theme = ["light", "dark"].includes(saved()) ? saved() : "";
  document.addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = root.dataset.theme;
    select.addEventListener("change", () => choose(select.value));
  });
})();
