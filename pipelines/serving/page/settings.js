// The model and the settings of a request.

import { $ } from "./dom.js";

const form = $("settings-form");

/** Fills the choice of models, and the server's own settings. @param {object} facts what the server tells its page */
export function showSettings(models, facts) {
  $("model").replaceChildren(...models.map(({ id }) => new Option(id)));
  form.max_tokens.placeholder = facts.max_tokens;
  form.multi_turn.checked = facts.multi_turn;
  form.querySelector("fieldset").disabled = false; // what is chosen from now on stays
  summarise();
}

/** Whether earlier turns are sent along. */
export const multiTurn = () => form.multi_turn.checked;

/** The fields of a request, or null where a setting is not possible (the browser then shows which). */
export function settings() {
  if (!form.checkValidity()) {
    $("settings").open = true;
    form.reportValidity();
    return null;
  }
  const given = { model: $("model").value, temperature: form.temperature.valueAsNumber, top_p: form.top_p.valueAsNumber };
  for (const name of ["max_tokens", "seed"]) if (form[name].value) given[name] = form[name].valueAsNumber;
  return given;
}

function summarise() {
  const { temperature, top_p: share, seed, max_tokens: longest } = form;
  const parts = [Number(temperature.value) === 0 ? "greedy" : `temperature ${temperature.value}`];
  if (Number(temperature.value) > 0 && Number(share.value) < 1) parts.push(`top p ${share.value}`);
  if (Number(temperature.value) > 0 && seed.value) parts.push(`seed ${seed.value}`);
  parts.push(`${longest.value || longest.placeholder} tokens`);
  $("settings-summary").textContent = parts.join(" · ");
}

form.addEventListener("input", summarise);
document.addEventListener("pointerdown", (event) => {
  if (!$("settings").contains(event.target)) $("settings").open = false;
});
$("settings").addEventListener("keydown", (event) => {
  const ends = event.key === "Escape" || (event.key === "Enter" && event.target.localName === "input");
  if (!ends || !$("settings").open) return;
  event.preventDefault();
  $("settings").open = false;
  $("settings").querySelector("summary").focus();
});
