// One question and its answer on the page.

import { $, copy, counted, el } from "./dom.js";
import { Marked } from "./points.js";

export class Turn {
  /**
   * @param {string} question
   * @param {Medium[]} media files of this question
   * @param {Medium[]} seen files of the whole conversation up to here, in the order in which they are sent
   */
  constructor(question, media, seen) {
    Object.assign(this, { question, media, seen, text: "", kept: false });
    this.marked = new Map();
    this.started = performance.now();
    this.written = new Text();
    this.answer = el("p", { className: "text" }, this.written);
    this.figures = el("div", { className: "figures" });
    this.foot = el("div", { className: "foot" });
    const thumbnails = media.length ? el("div", { className: "media" }, ...media.map((medium) => medium.thumbnail(medium.name))) : null;
    this.element = el(
      "li",
      { className: "turn working" },
      el("div", { className: "asked" }, el("h3", { className: "hidden", textContent: "Question" }), thumbnails, el("p", { textContent: question })),
      el("div", { className: "answer" }, el("h3", { className: "hidden", textContent: "Answer" }), this.figures, this.answer, this.foot),
    );
  }

  /** Takes an event of the stream. */
  take(event) {
    const [choice] = event.choices;
    if (event.usage) this.usage = event.usage;
    if (!choice) return;
    if (choice.delta.content) {
      this.text += choice.delta.content;
      this.written.appendData(choice.delta.content);
    }
    for (const point of choice.delta.points ?? []) this.mark(point);
    this.ending = choice.finish_reason ?? this.ending;
  }

  mark(point) {
    const timed = point.t !== null && point.t !== undefined;
    const among = this.seen.filter(({ kind }) => kind === (timed ? "video" : "image"));
    const medium = among[point.image] ?? among.at(-1);
    if (!medium) return;
    if (!this.marked.has(medium)) {
      const marked = new Marked(medium);
      this.marked.set(medium, marked);
      this.figures.append(marked.element);
      this.element.classList.add("pointed");
    }
    this.marked.get(medium).add(point);
  }

  /** The answer is complete. @param {Object<string, function>} actions by the name of their button */
  end(actions) {
    this.kept = true;
    const seconds = ((performance.now() - this.started) / 1000).toFixed(1);
    const words = this.usage ? `${counted(this.usage.completion_tokens, "token")} in ${seconds} s` : `${seconds} s`;
    this.finish(this.ending === "length" ? `${words}, cut at the longest answer that the settings allow` : words, actions);
    const points = [...this.marked.values()].reduce((sum, { points }) => sum + points.length, 0);
    announce(`Answer: ${this.text}${points ? `. ${counted(points, "point")} on the picture.` : ""}`);
    if (!this.text) this.answer.append(el("em", { textContent: "The model answered with nothing." }));
  }

  /** The user stopped it; what there is of the answer stays. */
  stopped(actions) {
    this.kept = this.text !== "";
    this.finish("Stopped", actions);
    announce("Stopped.");
  }

  /** There is no answer, or a part of one. */
  failed(message, actions) {
    this.finish("", actions, el("p", { className: "error", role: "alert", textContent: message }));
  }

  finish(words, actions, error = null) {
    this.element.classList.remove("working");
    const buttons = Object.entries(actions).map(([name, action]) => {
      const button = el("button", { type: "button", textContent: name });
      button.addEventListener("click", () => action(button));
      return button;
    });
    this.foot.replaceChildren(...(words ? [el("small", { textContent: words })] : []), ...buttons);
    if (error) this.foot.before(error);
  }
}

/** Tells those who do not see the page. */
export const announce = (words) => {
  $("status").textContent = words;
};

/** An action that copies a text and says so on its button. @param {function(): string} text */
export const copying = (text) => async (button) => {
  const name = button.textContent;
  button.textContent = await copy(text()).then(() => "Copied", (error) => `Not copied: ${error.message}`);
  announce(button.textContent);
  setTimeout(() => (button.textContent = name), 1500);
};
