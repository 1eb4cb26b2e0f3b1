// Pages through examples: another split begins at its first, and the arrow keys turn pages.

import "./common.js";

const form = document.getElementById("page");

form.elements.split.addEventListener("change", () => {
  form.elements.first.value = 0;
  form.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea") || event.altKey || event.ctrlKey || event.metaKey) return;
  const way = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  if (way) document.querySelector(`a[rel="${way}"]`)?.click();
});
