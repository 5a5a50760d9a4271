// A click on a figure shows it large; a click or Escape closes it.
document.addEventListener("click", (event) => {
  const figure = event.target.closest("article img");
  if (!figure || figure.closest("a")) return;
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", figure.alt);
  dialog.append(figure.cloneNode());
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (press) => {
    if (press.key === "Escape") dialog.close(); // the site's own use of this key would keep it open
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
});
