// Paper is narrower than most screens: figures are drawn again for it, and everything is unfolded.
const PAPER = 700; // pixels, the width of A4 between its margins
let folded = [];
const figures = () => [...document.querySelectorAll(".plotly-graph-div")].filter((div) => div._fullLayout);
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((details) => (details.open = true));
  figures().forEach((div) => Plotly.relayout(div, { width: PAPER }));
});
addEventListener("afterprint", () => {
  folded.forEach((details) => (details.open = false));
  figures().forEach((div) => Plotly.relayout(div, { width: null, autosize: true }));
});
