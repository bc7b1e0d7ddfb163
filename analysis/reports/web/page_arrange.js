// A reader's own order of figures: hide one, move it up, or pin it above all others.
const pinned = document.createElement("div");
pinned.id = "pinned";

function arrange(figure) {
  const bar = document.createElement("div"), home = document.createComment(figure.dataset.name);
  bar.className = "tools arrange";
  figure.prepend(bar);
  button(bar, "Hide", null, (self) => {
    const hidden = figure.classList.toggle("away");
    self.textContent = hidden ? `Show ${figure.dataset.name}` : "Hide";
  });
  button(bar, "Move up", null, () => {
    let before = figure.previousElementSibling;
    while (before && before.tagName !== "FIGURE") before = before.previousElementSibling;
    before?.before(figure);
    figure.scrollIntoView({ block: "nearest" });
  });
  button(bar, "Pin", null, (self) => {
    if (figure.parentElement === pinned) home.replaceWith(figure);
    else {
      figure.before(home);
      pinned.append(figure);
    }
    self.textContent = figure.parentElement === pinned ? "Unpin" : "Pin";
    (figure.parentElement === pinned ? pinned : figure).scrollIntoView({ block: "nearest" });
  });
}
document.getElementById("tools").after(pinned);
