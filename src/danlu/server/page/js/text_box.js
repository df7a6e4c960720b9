/** What all boxes for text share. */

/** Makes a box as high as its text; the style sheet bounds it. */
export function grow(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`;
}

/** Enter that chooses a word of an input method is no Enter. Safari ends the composition before the key: 229. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;
