// The question that is being written, and the files that go with it.

import { $, el, sizeText } from "./dom.js";
import { medium } from "./media.js";

const question = $("question");
let attached = [];

/** @param {function(string, Medium[]): void} ask is called with what was written; it calls `clear` once that is on its way */
export function startComposer(ask) {
  const send = () => {
    if (question.value.trim()) ask(question.value.trim(), attached);
    else question.focus();
  };
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  question.addEventListener("input", fit);
  $("choose").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", async () => {
    await attach([...$("files").files]);
    $("files").value = "";
    question.focus();
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    attach(files);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    attach([...event.dataTransfer.files]);
    question.focus();
  });
}

/** Puts a question and its files back to be changed. */
export function edit(text, media) {
  question.value = text;
  attached = [...media];
  show();
  question.focus();
}

export const clear = () => {
  question.value = "";
  attached = [];
  show();
};

async function attach(files) {
  tell("");
  for (const file of files) {
    try {
      attached.push(await medium(file, file.name));
    } catch (error) {
      tell(error.message);
    }
  }
  show();
}

/** Says what is wrong with what was chosen; "" = nothing. */
export const tell = (problem) => {
  $("composer-problem").textContent = problem;
};

function show() {
  $("attached").replaceChildren(
    ...attached.map((chosen) => {
      const remove = el("button", { type: "button", textContent: "×", title: "Remove", "aria-label": `Remove ${chosen.name}` });
      remove.addEventListener("click", () => {
        attached = attached.filter((other) => other !== chosen);
        show();
        question.focus();
      });
      const name = el("span", { className: "name", textContent: chosen.name });
      return el("li", {}, chosen.thumbnail("not shown"), name, el("small", { textContent: sizeText(chosen.blob.size) }), remove);
    }),
  );
  fit();
}

/** As high as its text, up to a limit that the style sheet sets. */
function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}
