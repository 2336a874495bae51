// Examples to click.

import { file } from "./client.js";
import { $, el } from "./dom.js";
import { medium } from "./media.js";

/** @param {{question: string, file: ?string, name: ?string}[]} examples @param {function(string, Medium[]): void} ask */
export function showExamples(examples, ask) {
  $("examples").replaceChildren(
    ...examples.map(({ question, file: path, name }) => {
      const picture = path && (/\.(mp4|webm)$/.test(path)
        ? el("video", { src: `page/${path}`, muted: true, preload: "metadata" })
        : el("img", { src: `page/${path}`, alt: "" }));
      const button = el("button", { type: "button" }, picture || null, el("span", { textContent: question }));
      button.addEventListener("click", async () => ask(question, path ? [await medium(await file(path), name)] : []));
      return el("li", {}, button);
    }),
  );
}
