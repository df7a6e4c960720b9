/** Work that is asked for more often than it need be done, such as drawing at each token. */
export class Paced {
  #work;
  #waiting = false;
  #notBefore = 0;

  constructor(work) {
    this.#work = work;
  }

  /** Does the work before the next frame, yet never takes more than a quarter of the time. */
  ask() {
    if (this.#waiting) return;
    this.#waiting = true;
    const pause = this.#notBefore - performance.now();
    const frame = () => requestAnimationFrame(() => this.#waiting && this.now());
    if (pause > 0) setTimeout(frame, pause);
    else frame();
  }

  now() {
    this.#waiting = false;
    const start = performance.now();
    this.#work();
    const end = performance.now();
    this.#notBefore = end + 3 * (end - start);
  }
}
