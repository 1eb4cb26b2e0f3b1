// What can be done to a checkpoint.

import { post } from "./common.js";
import { refresh } from "./live.js";

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-post]");
  if (!button) return;
  const said = button.closest(".actions").querySelector("output");
  button.disabled = true;
  said.className = "small";
  said.textContent = `${button.textContent} …`;
  try {
    const answer = await post(button.dataset.post);
    said.textContent = answer.message;
  } catch (error) {
    said.className = "small bad";
    said.textContent = error.message;
  } finally {
    button.disabled = false;
    refresh();
  }
});

document.querySelector('select[name="run"]').addEventListener("change", (event) => event.target.form.requestSubmit());
