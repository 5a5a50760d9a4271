// A click on a figure shows it large; a click or Escape closes it.
document.addEventListener("click", (event) => {
  const figure = event.target.closest("div.cell_output img, article img.large");
  if (!figure) return;
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", figure.alt);
  dialog.append(figure.cloneNode());
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
});
