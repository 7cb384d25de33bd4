"use strict";
// The page reads without this file. It adds: the value of the token under the pointer, the finger
// or the cursor; left and right through tokens; up and down through queries and sequences.

function show(block, token) {
  block.querySelector(".here")?.classList.remove("here");
  token.classList.add("here");
  let next = token.nextElementSibling;
  if (next?.tagName === "EM") next = next.nextElementSibling;
  const after = next?.tagName === "B" ? `, before “${next.textContent}”` : "";
  const [position, output, input] = token.title.split(" | ");
  block.readout.textContent = output
    ? `“${token.textContent}”${after}: ${position}; as output ${output}; as input ${input} nats`
    : `“${token.textContent}”${after}: ${position} nats`;
}

for (const block of document.querySelectorAll(".t")) {
  block.tabIndex = 0;
  block.setAttribute("role", "group");
  block.setAttribute("aria-label", "Tokens; left and right arrow keys show their influence");
  block.readout = document.createElement("output");
  block.readout.className = "at";
  block.after(block.readout);
}

for (const kind of ["pointerover", "click"]) {
  document.addEventListener(kind, (event) => {
    const token = event.target.closest(".t b");
    if (token) show(token.parentElement, token);
  });
}

function neighbour(items, current, step) {
  const seen = items.filter((item) => item.checkVisibility());
  return seen[seen.indexOf(current) + step];
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const sideways = event.key === "ArrowLeft" || event.key === "ArrowRight";
  const at = document.activeElement;
  if (sideways && at.matches(".t")) {
    const tokens = [...at.querySelectorAll("b")];
    const here = tokens.findIndex((token) => token.classList.contains("here"));
    const token = tokens[Math.min(Math.max(here + step, 0), tokens.length - 1)];
    if (token) show(at, token);
  } else if (at.matches("nav a")) {
    neighbour([...document.querySelectorAll("nav a")], at, step)?.focus();
  } else if (!sideways && at.matches("summary")) {
    neighbour([...document.querySelectorAll("summary")], at, step)?.focus();
  } else {
    return;
  }
  event.preventDefault();
});
