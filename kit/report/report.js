// Headings sort their table by a button; selects and a search box filter what stands below them.
for (const head of document.querySelectorAll("thead th:not(.unsorted)")) {
  const at = head.cellIndex, table = head.closest("table"), body = table.tBodies[0];
  const key = row => {
    const text = row.cells[at].textContent.trim();
    const number = /^[+<-]?\s*[\d.,]+(?=[\s%x\[]|$)/.exec(text);
    return number ? parseFloat(number[0].replace(/[,<+\s]/g, "")) : text;
  };
  const compare = (a, b) =>
    typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : a < b ? -1 : a > b ? 1 : 0;
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort((a, b) => sign * compare(a[0], b[0]));
    body.append(...rows.map(pair => pair[1]));
  });
}
for (const form of document.querySelectorAll("form.filter")) {
  const all = [...form.parentElement.querySelectorAll(form.dataset.rows)];
  const said = form.querySelector("output"), fields = [...form.querySelectorAll("select, input")];
  const show = () => {
    const chosen = fields.filter(field => field.value);
    const fits = row => chosen.every(field => field.type === "search"
      ? row.textContent.toLowerCase().includes(field.value.toLowerCase())
      : row.dataset[field.name] === field.value);
    for (const row of all) row.hidden = !fits(row);
    const shown = all.filter(row => !row.hidden);
    for (const row of chosen.length ? shown : []) {
      const block = row.closest("details.block");
      if (block) block.open = true;
    }
    said.value = `${shown.length} of ${all.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", event => event.preventDefault());
  show();
}
