// Before the first paint: the colours the user chose, or none, which leaves it to the system.
(() => {
  try {
    const theme = localStorage.getItem("headrace.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch { /* storage is off: the system decides */ }
})();
