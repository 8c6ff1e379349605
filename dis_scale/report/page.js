// Words of a point while it is touched, sliders over pictures, folded notes on paper, and the page's age. Without scripts, all
// pictures are shown.
const tip = document.getElementById("tip");
function show(event) {
  const point = event.target.closest(".point");
  tip.hidden = !point;
  if (!point) return;
  event.preventDefault();
  tip.textContent = point.getAttribute("aria-label");
  const box = point.getBoundingClientRect(), half = tip.offsetWidth / 2 + 8;
  const middle = Math.min(Math.max(box.left + box.width / 2, half), document.documentElement.clientWidth - half);
  tip.style.left = `${middle + scrollX}px`;
  tip.style.top = `${box.top + box.height / 2 + scrollY}px`;
}
for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, show);
for (const slider of document.querySelectorAll("input[type=range]")) {
  const pictures = [...slider.parentElement.querySelectorAll("figure[data-turn]")];
  const turn = () => pictures.forEach((picture, i) => { picture.hidden = i !== Number(slider.value); });
  slider.addEventListener("input", turn);
  turn();
}
const folded = document.querySelectorAll("details:not([open])");
addEventListener("beforeprint", () => folded.forEach(notes => { notes.open = true; }));
addEventListener("afterprint", () => folded.forEach(notes => { notes.open = false; }));
const written = document.querySelector("[data-at]");  // a sweep that has stopped writes no page any more
if (written) {
  const minutes = Math.floor((Date.now() / 1000 - written.dataset.at) / 60);
  if (minutes > 1) written.textContent += `, ${minutes} minutes ago`;
  if (minutes > 120) written.textContent += ": the sweep may have stopped (dis-scale status)";
}
